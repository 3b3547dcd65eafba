"""Better layouts near a given one: cyclic moves between stages, and exchanges of two devices."""

from typing import NamedTuple

import numpy as np

from capstan.allocation.cost import CostModel
from capstan.allocation.pair_seconds import Numbers

EXCHANGES_AT_ONCE = 256
_SMALLEST_GAIN = 1e-12


def cyclic_moves(model: CostModel, layout: Numbers, rng: np.random.Generator) -> Numbers:
    """(many, stages, replicas): the layout given, and those that one chain of moves leads to.

    The chain goes from stage to stage and moves each device once. From a stage the device leaves whose
    cheapest link inside the stage is cheapest: that link is wasted on data parallelism, which waits for the
    dearest. It goes to the stage, not yet on the chain, with which its links are dearest on average. After
    every move the chain is closed by sending a device back to the first stage: one of the layouts.

    Source: the local search of DT-FM, arXiv 2206.01288, after Kernighan and Lin.
    Differs: the caller compares prefixes by the whole cost, not by a sum of gains.
    """
    seconds = model.pairs.boundary
    stages = len(layout)
    groups = layout.copy()
    first = int(rng.integers(stages))
    current, visited, closed = first, [first], [layout]
    # Of a cyclic partitioning pass: a slot of `first` is empty, the device in hand was moved last.
    slot = _leaver(seconds, groups[first])
    hand = int(groups[first, slot])
    while len(visited) < stages:
        means = seconds[hand][groups].mean(axis=1)
        means[visited] = -1.0
        current = int(means.argmax())
        visited.append(current)
        place = _leaver(seconds, groups[current])
        hand, groups[current, place] = int(groups[current, place]), hand
        done = groups.copy()
        done[first, slot] = hand
        closed.append(done)
    return np.stack(closed)


class Refined(NamedTuple):
    """A layout, and how many exchanges were tried on the way to it."""

    layout: Numbers
    num_tried: int


def exchange_until_best(model: CostModel, layout: Numbers, rng: np.random.Generator, *, most: int) -> Refined:
    """Exchange two devices of two stages, always the pair that helps most, until none helps.

    Devices of one class are exchanged once for all. Of more than `EXCHANGES_AT_ONCE` pairs as many are drawn
    at random; no further ones are tried when `most` have been.
    """
    best_s = float(model.total_s(layout[None])[0])
    num_tried = 0
    while num_tried < most:
        nearby = _exchanges(model.pairs.classes, layout, rng)
        if not len(nearby):
            break
        num_tried += len(nearby)
        totals = model.total_s(nearby)
        number = int(totals.argmin())
        if not totals[number] < best_s * (1 - _SMALLEST_GAIN):
            break
        layout, best_s = nearby[number], float(totals[number])
    return Refined(layout, num_tried)


def _leaver(seconds: np.ndarray[tuple[int, ...], np.dtype[np.float64]], group: Numbers) -> int:
    if len(group) == 1:
        return 0
    inside = seconds[np.ix_(group, group)].copy()
    np.fill_diagonal(inside, np.inf)
    return int(inside.min(axis=1).argmin())


def _exchanges(classes: Numbers, layout: Numbers, rng: np.random.Generator) -> Numbers:
    """(many, stages, replicas): the layouts one exchange away."""
    stages, replicas = layout.shape
    kinds = classes[layout]
    # The first member of each class stands for the others of its stage.
    stands = np.array([np.isin(np.arange(replicas), np.unique(row, return_index=True)[1]) for row in kinds])
    slots = np.flatnonzero(stands.ravel())
    first, second = np.triu_indices(len(slots), k=1)
    one, other = slots[first], slots[second]
    flat = layout.ravel()
    useful = (one // replicas != other // replicas) & (classes[flat[one]] != classes[flat[other]])
    one, other = one[useful], other[useful]
    if len(one) > EXCHANGES_AT_ONCE:
        drawn = rng.choice(len(one), EXCHANGES_AT_ONCE, replace=False)
        one, other = one[drawn], other[drawn]
    nearby = np.tile(flat, (len(one), 1))
    rows = np.arange(len(one))
    nearby[rows, one], nearby[rows, other] = flat[other], flat[one]
    return nearby.reshape(-1, stages, replicas)
