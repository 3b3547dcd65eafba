"""Who trains when, on which samples: a function of sizes, settings and seed alone. NumPy only.

Planner and driver read the same schedule, so that what is planned is what is sent.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from capstan.errors import UsageError, unknown_name

JOINT = ("joint", "u-shaped")
ALGORITHMS = ("fedavg", "split", "splitfed-v1", "splitfed-v2", *JOINT)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How devices and server train together.

    `algorithm`:

        fedavg        whole models on devices, averaged each epoch; nothing crosses in between
        split         one bottom, handed on from device to device; one top
        splitfed-v1   a bottom and a copy of the top for each device, both averaged each epoch
        splitfed-v2   one top that sees the devices in random order; bottoms averaged each epoch
        joint         the paper's: in an iteration the top sees all devices' batches as one
        u-shaped      as joint, but device parts have a head as well, and labels stay where they are

    `average_every` is for the last two: how many iterations lie between averages of the device parts, None
    for an epoch. With 1, the default, training is synchronous SGD on the uncut network; the drift between
    rarer averages costs accuracy where devices hold different labels. `fraction_train` of the devices take
    part in an epoch; an iteration goes on with `quorum` of those that were expected; a device is lost in an
    iteration with probability `loss_rate`, which simulates stragglers and failures.

    Source: McMahan et al., arXiv 1602.05629 (fedavg); Vepakomma et al., arXiv 1812.00564 (split, u-shaped);
    Thapa et al., arXiv 2004.12088 (splitfed); Yuan et al., arXiv 2005.05083 (joint).
    Differs: that paper does not say how often, or whether, device parts are averaged.
    """

    algorithm: str = "joint"
    learning_rate: float = 0.05
    momentum: float = 0.9
    average_every: int | None = 1
    fraction_train: float = 1.0
    quorum: float = 1.0
    loss_rate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise unknown_name("algorithm", self.algorithm, ALGORITHMS)
        for name in ("fraction_train", "quorum"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"{name} must be above 0 and at most 1, found {getattr(self, name)}.")
        if not 0 <= self.loss_rate < 1 or not 0 <= self.momentum < 1 or not self.learning_rate > 0:
            raise UsageError(
                "loss_rate and momentum must be from 0 to below 1 and learning_rate above 0, found "
                f"{self.loss_rate}, {self.momentum} and {self.learning_rate}."
            )
        if self.average_every is not None and self.average_every < 1:
            raise UsageError(f"average_every must be at least 1, or null for an epoch: {self.average_every}.")
        if not self.is_joint and (self.quorum < 1 or self.loss_rate > 0):
            raise UsageError(
                f"Quorum and loss_rate are of iterations that several devices share; {self.algorithm} has "
                f"none. Use one of {', '.join(JOINT)}, or leave them out."
            )

    @property
    def is_joint(self) -> bool:
        """Whether an iteration has the batches of several devices."""
        return self.algorithm in JOINT


class Batch(NamedTuple):
    """Some samples of a device: their places on it, which are those from `start` on in the epoch's order."""

    device: int
    rows: NDArray[np.int64]
    start: int

    @property
    def stop(self) -> int:
        """Where the samples that follow in that order start."""
        return self.start + len(self.rows)


class Iteration(NamedTuple):
    """Batches that the server's part sees as one, and the devices that are averaged afterwards."""

    batches: tuple[Batch, ...]
    averaged: tuple[int, ...]


def participants(sizes: Sequence[int], settings: Settings, epoch: int) -> tuple[int, ...]:
    """The devices of an epoch: ceil(fraction_train * devices) of them, those without samples left out."""
    with_samples = [device for device, size in enumerate(sizes) if size]
    count = math.ceil(settings.fraction_train * len(with_samples) - 1e-9)
    rng = np.random.default_rng([settings.seed, 1, epoch])
    chosen: list[int] = rng.choice(with_samples, count, replace=False).tolist() if with_samples else []
    return tuple(sorted(chosen))


def device_order(devices: tuple[int, ...], settings: Settings, epoch: int) -> tuple[int, ...]:
    """One after the other: as numbered for `split`, in random order for `splitfed-v2`."""
    if settings.algorithm != "splitfed-v2":
        return devices
    order: list[int] = np.random.default_rng([settings.seed, 2, epoch]).permutation(devices).tolist()
    return tuple(order)


def sample_order(settings: Settings, epoch: int, device: int, size: int) -> NDArray[np.int64]:
    """The order in which a device takes its `size` samples in an epoch."""
    return np.random.default_rng([settings.seed, 3, epoch, device]).permutation(size)


def epoch_iterations(
    sizes: Sequence[int], batch_sizes: Sequence[int], settings: Settings, epoch: int
) -> Iterator[Iteration]:
    """The iterations of an epoch, in order.

    Each device shuffles its samples by a seed of its own. What it takes at once is at most its batch. Joint
    iterations are as many as the slowest device needs, and every device spreads its samples evenly over all
    of them: if the small ones came to an end before the others, the last iterations would teach the server's
    part the labels of the large ones only. Who is averaged at an epoch's end stands in its last iteration.
    """
    devices = participants(sizes, settings, epoch)
    counts = {device: -(-sizes[device] // batch_sizes[device]) for device in devices}
    if settings.is_joint:
        counts = dict.fromkeys(devices, max(counts.values(), default=0))
    dealt = {}
    for device in device_order(devices, settings, epoch):
        order = sample_order(settings, epoch, device, sizes[device])
        if settings.is_joint:
            edges = np.arange(counts[device] + 1) * sizes[device] // counts[device]
        else:
            edges = np.minimum(np.arange(counts[device] + 1) * batch_sizes[device], sizes[device])
        dealt[device] = [Batch(device, order[start:end], int(start)) for start, end in pairwise(edges)]
    if settings.is_joint:
        yield from _joint(list(dealt.values()), settings)
        return
    for device, batches in dealt.items():
        for at, batch in enumerate(batches):
            is_last = at == len(batches) - 1
            averaged: tuple[int, ...] = ()
            if is_last and settings.algorithm == "split":
                averaged = (device,)
            elif is_last and device == list(dealt)[-1]:
                averaged = devices
            yield Iteration((batch,), averaged)


def _joint(dealt: list[list[Batch]], settings: Settings) -> Iterator[Iteration]:
    seen: set[int] = set()  # since the last average
    count = len(dealt[0]) if dealt else 0
    for at, column in enumerate(zip(*dealt, strict=True)):
        batches = tuple(batch for batch in column if len(batch.rows))
        seen.update(batch.device for batch in batches)
        is_due = at == count - 1 or (
            settings.average_every is not None and (at + 1) % settings.average_every == 0
        )
        yield Iteration(batches, tuple(sorted(seen)) if is_due else ())
        if is_due:
            seen.clear()


def is_lost(settings: Settings, epoch: int, iteration: int, device: int) -> bool:
    """Whether a device's batch does not arrive in an iteration."""
    if settings.loss_rate == 0:
        return False
    draw = np.random.default_rng([settings.seed, 4, epoch, iteration, device]).random()
    return bool(draw < settings.loss_rate)
