"""Stages: the layers of a model divided over ranks, a contiguous run for each.

Rank r computes its layers for a wave of batches, hands the hidden states to rank r + 1 and goes on with the
next wave. The first rank has the input embedding, the last one the output matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import NamedTuple

from capstan.hardware import Link
from capstan.plans import link_name
from capstan.transport import Group


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The layers from `first` up to, not including, `end` of `num_layers`, on this rank of the group.

    `links` are those between the ranks, "rank 0" to "rank 1" and so on, as they were measured.
    """

    group: Group
    first: int
    end: int
    num_layers: int
    links: tuple[Link, ...] = ()

    @property
    def last_rank(self) -> int:
        return self.group.size - 1

    def seconds(self, link: str, size_bytes: int) -> float:
        """Seconds that a link between two ranks needs; nothing where it was not measured."""
        known = {link_name(each.source, each.target): each for each in self.links}
        return known[link].seconds(size_bytes) if link in known else 0.0


class Capacity(NamedTuple):
    """What a rank may use for weights, and how fast it reads them there."""

    device_bytes: float
    host_bytes: float
    device_bytes_per_s: float
    host_bytes_per_s: float  # over the link to the device
    disk_bytes_per_s: float

    def reading_s(self, size_bytes: float) -> float:
        """Seconds to read so many bytes of weights once, each as near to the device as there is room."""
        on_device = min(size_bytes, self.device_bytes)
        on_host = min(size_bytes - on_device, self.host_bytes)
        on_disk = size_bytes - on_device - on_host
        return (
            size_bytes / self.device_bytes_per_s
            + (on_host + on_disk) / self.host_bytes_per_s
            + on_disk / self.disk_bytes_per_s
        )


def divide(sizes: Sequence[int], head_bytes: int, capacities: Sequence[Capacity]) -> list[range]:
    """Contiguous runs of layers of these sizes, one for each rank, so that the slowest rank reads its weights
    in the least time; every rank gets at least one. The last one reads the output matrix besides.
    """
    num_layers, num_ranks = len(sizes), len(capacities)
    before = [sum(sizes[:index]) for index in range(num_layers + 1)]

    def reading_s(rank: int, first: int, end: int) -> float:
        extra_bytes = head_bytes if rank == num_ranks - 1 else 0
        return capacities[rank].reading_s(before[end] - before[first] + extra_bytes)

    # best[end]: seconds of the slowest rank so far, if they hold the layers before `end`, and their cuts
    best: list[tuple[float, list[int]]] = [(0.0, [0]), *[(inf, [])] * num_layers]
    for rank in range(num_ranks):
        best = [
            min(
                (
                    (max(slowest, reading_s(rank, first, end)), [*cuts, end])
                    for first, (slowest, cuts) in enumerate(best[:end])
                    if slowest < inf
                ),
                default=(inf, []),
            )
            for end in range(num_layers + 1)
        ]
    cuts = best[num_layers][1]
    return [range(first, end) for first, end in pairwise(cuts)]


def pipelined(seconds: Sequence[Sequence[float]], waves: int) -> list[list[float]]:
    """When each rank ends each turn, if rank r computes turn k in `seconds[r][k]`.

    A turn begins when the rank has ended its turn before, when the rank before has ended this one, and, on
    the first rank, when the last rank has ended the same wave's turn before, `waves` turns ago.
    """
    ends: list[list[float]] = [[] for _ in seconds]
    for turn in range(len(seconds[0])):
        ready = ends[-1][turn - waves] if turn >= waves else 0.0
        for own, durations in zip(ends, seconds, strict=True):
            ready = max(ready, own[-1] if own else 0.0) + durations[turn]
            own.append(ready)
    return ends
