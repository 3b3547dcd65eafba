"""Every layout of a few devices: the oracle of the other searches."""

from collections.abc import Iterator
from itertools import combinations
from math import factorial

import numpy as np

from capstan.allocation.cost import CostModel
from capstan.allocation.pair_seconds import Numbers
from capstan.errors import UsageError

MOST_LAYOUTS = 50_000


def num_layouts(num_devices: int, *, stages: int) -> int:
    """How many ways there are to divide devices into equal groups, whatever their order.

    devices! / (replicas!**stages stages!)
    """
    replicas = num_devices // stages
    count: int = factorial(num_devices) // (factorial(replicas) ** stages * factorial(stages))
    return count


def all_layouts(num_devices: int, *, stages: int) -> Numbers:
    """(many, stages, replicas): every layout once. The first group holds the first device that is left."""

    def divided(left: tuple[int, ...]) -> Iterator[list[tuple[int, ...]]]:
        if not left:
            yield []
            return
        for partners in combinations(left[1:], replicas - 1):
            group = (left[0], *partners)
            rest = tuple(device for device in left if device not in group)
            yield from ([group, *others] for others in divided(rest))

    replicas = num_devices // stages
    return np.array(list(divided(tuple(range(num_devices)))), dtype=np.intp)


def search_all(model: CostModel, *, stages: int) -> Numbers:
    """The cheapest of all layouts; the first of those that cost the same.

    Raises:
        UsageError: there are more than `MOST_LAYOUTS`.
    """
    count = num_layouts(model.pairs.num_devices, stages=stages)
    if count > MOST_LAYOUTS:
        raise UsageError(
            f"There are {count:.3g} layouts of {model.pairs.num_devices} devices in {stages} stages, and an "
            f"exhaustive search goes through {MOST_LAYOUTS:,} at most. Use the evolutionary search."
        )
    layouts = all_layouts(model.pairs.num_devices, stages=stages)
    best: Numbers = layouts[model.total_s(layouts).argmin()]
    return best
