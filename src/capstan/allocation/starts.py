"""Layouts to start from, built from the network's structure.

Two ideas make good layouts: a cluster of well-connected devices spread over all stages keeps pipelines inside
it, and a cluster kept in few stages keeps data parallelism inside it. Between them lie layouts in which some
clusters are spread over some stages and the rest over the others; where part of the machines are alone, as on
spot markets, only these are good, and no single exchange of devices leads to them.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from capstan.allocation.pair_seconds import Numbers, PairSeconds, Seconds

_MOST_LEVELS = 8


def structured_starts(pairs: PairSeconds, *, stages: int) -> Numbers:
    """(many, stages, replicas): distinct layouts in which clusters are spread over blocks of stages.

    For each way to see clusters (devices with equal rows; single linkage at several levels) devices are put
    in an order that keeps clusters together, the order is cut into blocks of whole stages, and each block is
    dealt round its stages. The cuts: none (all clusters over all stages), after every stage (clusters
    kept together), after stage k for every k (a subset of clusters over k stages), and between the larger
    clusters of a higher level.
    """
    replicas = pairs.num_devices // stages
    levels = list(cluster_levels(pairs))
    found: dict[bytes, Numbers] = {}

    def keep(order: Numbers, cuts: Sequence[int]) -> None:
        layout = dealt(order, cuts, replicas)
        found.setdefault(np.sort(layout, axis=1).tobytes(), layout)

    for clusters in levels:
        for order in _orders(pairs, clusters):
            keep(order, ())
            keep(order, range(1, stages))
            for cut in range(1, stages):
                keep(order, (cut,))
            for coarse in levels:
                if coarse.max() < clusters.max():
                    grouped = order[np.argsort(_rank_of_first(coarse[order]), kind="stable")]
                    keep(grouped, _cuts_between(coarse[grouped], replicas))
    return np.stack(list(found.values()))


def dealt(order: Numbers, cuts: Sequence[int], replicas: int) -> Numbers:
    """(stages, replicas): blocks of whole stages from `order`, each dealt to its stages one by one."""
    ends = [0, *sorted(set(cuts)), len(order) // replicas]
    blocks = [
        order[first * replicas : last * replicas].reshape(replicas, last - first).T
        for first, last in pairwise(ends)
    ]
    return np.concatenate(blocks)


def cluster_levels(pairs: PairSeconds) -> Iterator[Numbers]:
    """Cluster numbers of every device: exchangeable devices first, then single linkage from fine to coarse.

    Levels that say the same are given once; of many, those where the next coarser link is most dearer.
    """
    seen = set()
    for clusters in (pairs.classes, *_linkage_levels(pairs.boundary)):
        key = _rank_of_first(clusters).tobytes()
        if key not in seen:
            seen.add(key)
            yield clusters


def _linkage_levels(seconds: Seconds) -> list[Numbers]:
    """Connected components of all links up to a cost, at the costs after which the largest jumps follow."""
    steps = np.unique(_spanning_links(seconds))
    if len(steps) < 2:
        return []
    jumps = steps[1:] / np.maximum(steps[:-1], np.finfo(float).tiny)
    chosen = sorted(np.argsort(-jumps, kind="stable")[:_MOST_LEVELS])
    return [_components(seconds, steps[step]) for step in chosen]


def _spanning_links(seconds: Seconds) -> Seconds:
    """The costs on a minimum spanning tree, by Prim's method."""
    size = len(seconds)
    nearest, outside = seconds[0].copy(), np.ones(size, dtype=bool)
    outside[0] = False
    links = np.zeros(size - 1)
    for number in range(size - 1):
        device = int(np.where(outside, nearest, np.inf).argmin())
        links[number] = nearest[device]
        outside[device] = False
        nearest = np.minimum(nearest, seconds[device])
    return links


def _components(seconds: Seconds, most: float) -> Numbers:
    clusters = np.full(len(seconds), -1, dtype=np.intp)
    for start in range(len(seconds)):
        if clusters[start] >= 0:
            continue
        number = clusters.max() + 1
        front = np.array([start])
        while len(front):
            clusters[front] = number
            front = np.flatnonzero((seconds[front] <= most).any(axis=0) & (clusters < 0))
    return clusters


def _orders(pairs: PairSeconds, clusters: Numbers) -> Iterator[Numbers]:
    """Orders of devices that keep clusters together: by number; by size and speed; by nearness."""
    sizes, inside = np.bincount(clusters), _slowest_inside(pairs.boundary, clusters)
    numbers = np.arange(len(clusters))
    yield np.lexsort((numbers, clusters))
    # The fastest clusters first, larger ones before smaller ones: single machines come last.
    yield np.lexsort((numbers, clusters, -sizes[clusters], inside[clusters], sizes[clusters] == 1))
    yield np.lexsort((numbers, clusters, inside[clusters], -sizes[clusters]))
    place = np.argsort(_nearness_order(pairs.data_parallel, clusters))
    yield np.lexsort((numbers, place[clusters]))


def _slowest_inside(seconds: Seconds, clusters: Numbers) -> Seconds:
    inside = np.zeros(clusters.max() + 1)
    for cluster in range(len(inside)):
        members = np.flatnonzero(clusters == cluster)
        inside[cluster] = seconds[np.ix_(members, members)].max()
    return inside


def _nearness_order(seconds: Seconds, clusters: Numbers) -> Numbers:
    """Clusters such that each follows the nearest one before it, from the most remote one on."""
    count = clusters.max() + 1
    member = (clusters[:, None] == np.arange(count)).astype(float)
    shares = member / member.sum(axis=0)
    between = shares.T @ seconds @ shares
    order = [int(between.sum(axis=1).argmax())]
    left = np.ones(count, dtype=bool)
    left[order] = False
    while left.any():
        order.append(int(np.where(left, between[order[-1]], np.inf).argmin()))
        left[order[-1]] = False
    return np.array(order, dtype=np.intp)


def _rank_of_first(clusters: Numbers) -> Numbers:
    """Clusters renumbered in the order in which they appear."""
    _, first, inverse = np.unique(clusters, return_index=True, return_inverse=True)
    rank: Numbers = np.argsort(np.argsort(first))[inverse]
    return rank


def _cuts_between(clusters: Numbers, replicas: int) -> tuple[int, ...]:
    """Where the cluster changes along an order, in whole stages."""
    changes = np.flatnonzero(np.diff(clusters)) + 1
    stages = len(clusters) // replicas
    cuts = {round(change / replicas) for change in changes.tolist()}
    return tuple(sorted(cut for cut in cuts if 0 < cut < stages))
