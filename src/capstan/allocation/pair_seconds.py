"""Seconds between every two devices, as arrays, and which devices stand in for each other."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capstan.allocation.task import Tasklet
from capstan.errors import UsageError, unknown_name
from capstan.hardware import Cluster

Seconds = NDArray[np.float64]
Numbers = NDArray[np.intp]

ASYMMETRIC = ("refuse", "mean")


@dataclass(frozen=True, kw_only=True, eq=False)
class PairSeconds:
    """What each pair of devices costs when it shares a stage, and when it carries a boundary.

        data_parallel[d, e] = 2 (latency + gradient_bytes / (replicas bandwidth))
        boundary[d, e] = latency + activation_bytes / bandwidth

    Both are symmetric (devices, devices) matrices with a diagonal of 0. `classes` numbers devices that can be
    exchanged without changing either matrix: equal rows and columns, but for the two devices themselves.
    """

    data_parallel: Seconds
    boundary: Seconds
    classes: Numbers

    @property
    def num_devices(self) -> int:
        return len(self.classes)


def pair_seconds(
    cluster: Cluster, tasklet: Tasklet, *, replicas: int, asymmetric: str = "refuse"
) -> PairSeconds:
    """The cost of every pair in a cluster.

    Args:
        asymmetric: what to do where the two directions differ. The paper's cost knows only symmetric
            networks, so `refuse` says which pair differs. `mean` prices a pair by the mean of its
            directions' seconds: everything in the cost crosses once each way, so the sum of both is exact.

    Raises:
        UsageError: directions differ and `asymmetric` is `refuse`.
    """
    if asymmetric not in ASYMMETRIC:
        raise unknown_name("treatment of asymmetric links", asymmetric, ASYMMETRIC)
    latency, bandwidth = np.array(cluster.latency_s), np.array(cluster.bandwidth_bytes_per_s)
    if asymmetric == "refuse":
        _require_symmetric(cluster, latency, bandwidth)
    data_parallel = _both_ways(latency + tasklet.gradient_bytes / (replicas * bandwidth)) * 2
    boundary = _both_ways(latency + tasklet.activation_bytes / bandwidth)
    return PairSeconds(
        data_parallel=data_parallel,
        boundary=boundary,
        classes=exchangeable_devices(np.stack([data_parallel, boundary])),
    )


def exchangeable_devices(matrices: Seconds) -> Numbers:
    """A class number for each device of symmetric (matrix, device, device) matrices.

    Two devices are of one class when exchanging them changes nothing, that is when their rows agree in every
    other column. That is an equivalence: exchanging d with e and e with f, exchanges d with f.
    """
    size = matrices.shape[1]
    classes = np.full(size, -1, dtype=np.intp)
    firsts: defaultdict[bytes, list[int]] = defaultdict(list)
    for device in range(size):
        # Exchangeable devices see the same costs, in whatever order: one comparison for most that are not.
        seen = np.sort(np.delete(matrices[:, device], device, axis=1)).tobytes()
        for first in firsts[seen]:
            others = np.ones(size, dtype=bool)
            others[[first, device]] = False
            if np.array_equal(matrices[:, first, others], matrices[:, device, others]):
                classes[device] = classes[first]
                break
        else:
            firsts[seen].append(device)
            classes[device] = classes.max() + 1
    return classes


def _both_ways(seconds: Seconds) -> Seconds:
    mean: Seconds = (seconds + seconds.T) / 2
    np.fill_diagonal(mean, 0.0)
    return mean


def _require_symmetric(cluster: Cluster, latency: Seconds, bandwidth: Seconds) -> None:
    differs = np.argwhere((latency != latency.T) | (bandwidth != bandwidth.T))
    if not len(differs):
        return
    first, second = (int(number) for number in differs[0])
    one = cluster.link(cluster.names[first], cluster.names[second])
    other = cluster.link(cluster.names[second], cluster.names[first])
    raise UsageError(
        f"The cost model wants links that are the same in both directions, but {one.source} -> {one.target} "
        f"has {one.latency_s:g} s and {one.bandwidth_bytes_per_s:g} bytes/s and back {other.latency_s:g} s "
        f"and {other.bandwidth_bytes_per_s:g} bytes/s; {len(differs) // 2} pairs differ. Ask for the mean "
        "of both directions with --asymmetric mean, or correct the cluster."
    )
