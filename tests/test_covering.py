"""The default tests of a grid leave out no combination of as many parameters as they promise."""

from itertools import combinations, product

from hypothesis import given
from hypothesis import strategies as st

from covering import covering


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 3))
def test_any_so_many_parameters_meet_in_all_their_values(sizes: list[int], strength: int) -> None:
    names = "abcd"[: len(sizes)]
    grid = [dict(zip(names, values, strict=True)) for values in product(*map(range, sizes))]
    chosen = [grid[at] for at in covering(grid, strength)]
    for some in combinations(names, min(strength, len(names))):
        met = {tuple(test[name] for name in some) for test in chosen}
        assert met == set(product(*(range(sizes[names.index(name)]) for name in some)))


def test_a_grid_of_families_placements_and_shapes_needs_a_test_for_each_of_the_largest_pairs() -> None:
    grid = [{"family": f, "place": p, "block": b} for f in range(14) for p in range(10) for b in range(3)]
    assert 140 <= len(covering(grid, 2)) < 150
    assert len(covering(grid, 1)) == 14


def test_what_is_no_grid_is_covered_too() -> None:
    assert covering([{"a": 0, "b": 1}, {"a": 1, "b": 1}, {"a": 0, "b": 1}], 2) == {0, 1}
    assert covering([{}], 2) == {0}
