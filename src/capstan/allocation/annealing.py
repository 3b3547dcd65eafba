"""Simulated annealing over exchanges of two devices: a baseline for the other searches."""

import numpy as np

from capstan.allocation.cost import CostModel
from capstan.allocation.evolution import random_layouts
from capstan.allocation.pair_seconds import Numbers
from capstan.errors import UsageError

_LAST_TEMPERATURE = 1e-3


def search_annealing(
    model: CostModel,
    *,
    stages: int,
    rng: np.random.Generator,
    steps: int = 1000,
    start: Numbers | None = None,
) -> Numbers:
    """The cheapest layout met on a walk that accepts a dearer one with probability exp(-rise / temperature).

    The temperature falls geometrically from a tenth of the first layout's cost to a thousandth of that.
    `start` is a random layout unless given.
    """
    if steps < 1:
        raise UsageError(f"An annealing of {steps} steps does nothing; give at least 1.")
    if start is None:
        start = random_layouts(model.pairs.num_devices, stages=stages, count=1, rng=rng)[0]
    layout, cost_s = start, float(model.total_s(start[None])[0])
    best, best_s = layout, cost_s
    if stages == 1:
        return best
    temperatures = 0.1 * cost_s * np.geomspace(1, _LAST_TEMPERATURE, steps)
    for temperature_s in temperatures.tolist():
        candidate = _one_exchange(layout, rng)
        candidate_s = float(model.total_s(candidate[None])[0])
        if candidate_s <= cost_s or rng.random() < np.exp((cost_s - candidate_s) / temperature_s):
            layout, cost_s = candidate, candidate_s
        if cost_s < best_s:
            best, best_s = layout, cost_s
    return best


def _one_exchange(layout: Numbers, rng: np.random.Generator) -> Numbers:
    (one, other), slots = rng.choice(len(layout), 2, replace=False), rng.integers(layout.shape[1], size=2)
    changed = layout.copy()
    changed[one, slots[0]], changed[other, slots[1]] = layout[other, slots[1]], layout[one, slots[0]]
    return changed
