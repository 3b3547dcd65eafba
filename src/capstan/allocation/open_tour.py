"""The cheapest path that visits every stage once, wherever it starts: an open tour."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from capstan.allocation.pair_seconds import Numbers, Seconds

EXACT_STAGES = 12
_CHUNK_ENTRIES = 4_000_000


class _Layer(NamedTuple):
    """All paths of one length: which stages they visit, where they end, what they visited before that."""

    visited: Numbers
    last: Numbers
    before: Numbers


def open_tour_seconds(edges: Seconds) -> Seconds:
    """The length of the cheapest Hamiltonian path, for each of (many, stages, stages) symmetric matrices.

    Exact up to `EXACT_STAGES` stages, by dynamic programming over visited sets, all matrices at once; beyond
    that the best of nearest-neighbour paths after 2-opt, which may lie above the cheapest.

    Source: the pipeline cost of DT-FM, arXiv 2206.01288; the programme is Held and Karp's.
    """
    many, stages, _ = edges.shape
    if stages == 1:
        return np.zeros(many)
    if stages > EXACT_STAGES:
        return np.array([_length(each, _two_opt_tour(each)) for each in edges])
    chunk = max(1, _CHUNK_ENTRIES // (stages * stages << stages))
    ends = [_paths(edges[at : at + chunk])[:, -1].min(axis=1) for at in range(0, many, chunk)]
    return np.concatenate(ends)


def open_tour(edges: Seconds) -> tuple[int, ...]:
    """The stages in the order of a path whose length `open_tour_seconds` gives, of one matrix."""
    stages = len(edges)
    if stages > EXACT_STAGES:
        return _two_opt_tour(edges)
    paths = _paths(edges[None])[0]
    visited = (1 << stages) - 1
    last = int(paths[visited].argmin())
    order = [last]
    while len(order) < stages:
        visited ^= 1 << last
        last = int((paths[visited] + edges[last]).argmin())
        order.append(last)
    return tuple(order)


def _paths(edges: Seconds) -> Seconds:
    """(many, visited set, last stage): the cheapest path over exactly that set which ends there."""
    many, stages, _ = edges.shape
    paths = np.full((many, 1 << stages, stages), np.inf)
    paths[:, 1 << np.arange(stages), np.arange(stages)] = 0.0
    for layer in _layers(stages):
        extended = paths[:, layer.before] + edges[:, layer.last]
        paths[:, layer.visited, layer.last] = extended.min(axis=-1)
    return paths


@lru_cache(maxsize=EXACT_STAGES)
def _layers(stages: int) -> tuple[_Layer, ...]:
    sets = np.arange(1 << stages)
    visited, last = np.nonzero(sets[:, None] >> np.arange(stages) & 1)
    sizes = np.bitwise_count(visited)
    layers = []
    for size in range(2, stages + 1):
        members, ends = visited[sizes == size], last[sizes == size]
        layers.append(_Layer(members, ends, members ^ (1 << ends)))
    return tuple(layers)


def _length(edges: Seconds, order: tuple[int, ...]) -> float:
    return float(edges[list(order[:-1]), list(order[1:])].sum())


def _two_opt_tour(edges: Seconds) -> tuple[int, ...]:
    tours = [_two_opt(edges, _nearest_neighbours(edges, start)) for start in range(len(edges))]
    return tuple(min(tours, key=lambda tour: _length(edges, tuple(tour))))


def _nearest_neighbours(edges: Seconds, start: int) -> list[int]:
    order, left = [start], np.ones(len(edges), dtype=bool)
    left[start] = False
    while left.any():
        order.append(int(np.where(left, edges[order[-1]], np.inf).argmin()))
        left[order[-1]] = False
    return order


def _two_opt(edges: Seconds, order: list[int]) -> list[int]:
    """Reverse stretches while that shortens the path; a virtual stage at distance 0 closes it to a tour."""
    size = len(order)
    padded = np.zeros((size + 1, size + 1))
    padded[:size, :size] = edges
    path = np.array([size, *order, size])
    while True:
        ahead = padded[path[:-1], path[1:]]
        # Reversing i+1..j replaces the steps after i and after j.
        gain = (
            ahead[:, None] + ahead - padded[np.ix_(path[:-1], path[:-1])] - padded[np.ix_(path[1:], path[1:])]
        )
        first, last = np.unravel_index(np.triu(gain, k=2).argmax(), gain.shape)
        if gain[first, last] <= 1e-12 * ahead.sum() or last <= first + 1:
            return [int(stage) for stage in path[1:-1]]
        path[first + 1 : last + 1] = path[first + 1 : last + 1][::-1]
