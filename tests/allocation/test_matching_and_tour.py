from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from capstan.allocation.matching import bottleneck_matching, bottleneck_seconds
from capstan.allocation.open_tour import EXACT_STAGES, open_tour, open_tour_seconds
from capstan.allocation.pair_seconds import Seconds


def matrices(low: int, high: int) -> st.SearchStrategy[Seconds]:
    """Square, with few different entries, so that many are equal."""
    sizes = st.integers(low, high)
    return sizes.flatmap(
        lambda size: st.lists(st.integers(1, 9), min_size=size**2, max_size=size**2).map(
            lambda entries: np.array(entries, dtype=float).reshape(size, size)
        )
    )


@given(matrices(1, 6))
@settings(deadline=None)
def test_a_matching_is_as_cheap_as_the_best_of_all(seconds: Seconds) -> None:
    size = len(seconds)
    best = min(
        max(seconds[row, column] for row, column in enumerate(order)) for order in permutations(range(size))
    )
    found = bottleneck_matching(seconds)
    assert found.seconds == bottleneck_seconds(seconds[None])[0] == best
    assert sorted(found.partner) == list(range(size))
    assert max(seconds[row, column] for row, column in enumerate(found.partner)) == best


@pytest.mark.parametrize("size", [1, 7, 64, 65, 130])
def test_matchings_of_every_size_agree_with_scipys(size: int) -> None:
    blocks = np.random.default_rng(size).integers(1, 40, (5, size, size)).astype(float)
    # A column that is dear but for two rows needs more than each row's cheapest entry.
    blocks[:, 2:, 0] += 100.0
    blocks[:, :2, 1:] -= 0.5

    def matched(block: Seconds, most: float) -> int:
        return int((maximum_bipartite_matching(csr_array(block <= most)) >= 0).sum())

    for block, most in zip(blocks, bottleneck_seconds(blocks), strict=True):
        assert matched(block, most) == size
        assert matched(block, np.nextafter(most, 0)) < size


@given(matrices(1, 6))
@settings(deadline=None)
def test_a_tour_is_as_short_as_the_best_of_all_orders(drawn: Seconds) -> None:
    edges = drawn + drawn.T
    lengths = [
        sum(edges[one, other] for one, other in pairwise(order)) for order in permutations(range(len(edges)))
    ]
    order = open_tour(edges)
    assert sorted(order) == list(range(len(edges)))
    assert open_tour_seconds(edges[None])[0] == min(lengths)
    assert sum(edges[one, other] for one, other in pairwise(order)) == min(lengths)


def test_beyond_the_exact_size_a_tour_on_a_line_is_the_line() -> None:
    size = EXACT_STAGES + 8
    place = np.random.default_rng(0).permutation(size).astype(float)
    edges = np.abs(place[:, None] - place)
    assert open_tour_seconds(edges[None])[0] == size - 1
    assert [place[stage] for stage in open_tour(edges)] in (list(range(size)), list(range(size))[::-1])
