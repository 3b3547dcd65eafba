"""Parts whose largest sum is smallest, against every way to cut."""

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from capstan.models.balance import balanced_ends


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.data())
def test_no_cut_has_a_smaller_largest_part(costs: list[int], data: st.DataObject):
    num_parts = data.draw(st.integers(1, len(costs)))

    def largest(ends: tuple[int, ...]) -> int:
        return max(sum(costs[start:end]) for start, end in pairwise((0, *ends)))

    every = [(*inner, len(costs)) for inner in combinations(range(1, len(costs)), num_parts - 1)]
    ends = tuple(balanced_ends(costs, num_parts))
    assert ends in every
    assert largest(ends) == min(map(largest, every))
