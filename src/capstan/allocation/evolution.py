"""The paper's evolutionary search: crossover of two layouts, local search, the better child stays."""

from dataclasses import dataclass

import numpy as np

from capstan.allocation.cost import CostModel
from capstan.allocation.layout import contiguous, strided
from capstan.allocation.local_search import cyclic_moves, exchange_until_best
from capstan.allocation.pair_seconds import Numbers
from capstan.allocation.starts import structured_starts
from capstan.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """How far to search.

    `random_layouts` join the structured starts; the cheapest `population` of all live on. Each of `trials`
    makes one child. At the end, about `exchanges` exchanges are tried on the cheapest, one after the other.
    """

    population: int = 100
    random_layouts: int = 100
    trials: int = 60
    exchanges: int = 1000
    structured: bool = True

    def __post_init__(self) -> None:
        least = {"population": 2, "random_layouts": 2, "trials": 0, "exchanges": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UsageError(f"{name} is {getattr(self, name)}; give at least {bound}.")


_INHERITED_DEVICES = 5


def search_evolution(
    model: CostModel, *, stages: int, rng: np.random.Generator, settings: Evolution | None = None
) -> Numbers:
    """The cheapest layout that the search finds; the same for the same state of `rng`.

    The structured starts and the layouts people write down are among the first generation, so the result is
    never dearer than they.

    Source: DT-FM, arXiv 2206.01288, its evolutionary search with cyclic partitioning.
    Differs: the generator is seeded; no two layouts of a generation are the same; the cheapest new child
    replaces its dearer parent only when it is cheaper than that one (the published program compared with a
    truth value); structured starts, without which the spot setting is a plateau; exchanges refine the
    cheapest.
    """
    wanted = settings or Evolution()
    layouts = _first_generation(model, stages, rng, wanted)
    totals = model.total_s(layouts)
    kept = np.argsort(totals, kind="stable")[: wanted.population]
    layouts, totals = layouts[kept], totals[kept]
    known = set(model.keys(layouts))
    for _ in range(wanted.trials if len(layouts) > 1 and stages > 1 else 0):
        one, other = rng.choice(len(layouts), size=2, replace=False)
        children = cyclic_moves(model, crossover(layouts[one], layouts[other], rng), rng)
        children_s, keys = model.total_s(children), model.keys(children)
        new = [number for number, key in enumerate(keys) if key not in known]
        child = min(new, key=lambda number: children_s[number], default=None)
        worse = one if totals[one] > totals[other] else other
        if child is not None and children_s[child] < totals[worse]:
            known.add(keys[child])
            layouts[worse], totals[worse] = children[child], children_s[child]
    return _refined(model, layouts[np.argsort(totals, kind="stable")], rng, wanted.exchanges)


def _refined(model: CostModel, layouts: Numbers, rng: np.random.Generator, exchanges: int) -> Numbers:
    """The cheapest after exchanges, spent on one layout after the other."""
    best: Numbers = layouts[0]
    best_s = float(model.total_s(layouts[:1])[0])
    for layout in layouts:
        if exchanges <= 0:
            break
        found = exchange_until_best(model, layout, rng, most=exchanges)
        exchanges -= found.num_tried
        found_s = float(model.total_s(found.layout[None])[0])
        if found_s < best_s:
            best, best_s = found.layout, found_s
        if not found.num_tried:
            break  # All devices are exchangeable.
    return best


def random_layouts(num_devices: int, *, stages: int, count: int, rng: np.random.Generator) -> Numbers:
    """(count, stages, replicas): devices in random order, cut into stages."""
    orders = rng.permuted(np.tile(np.arange(num_devices), (count, 1)), axis=1)
    return orders.reshape(count, stages, -1)


def crossover(one: Numbers, other: Numbers, rng: np.random.Generator) -> Numbers:
    """`other`, but a few random devices stand in the stage that `one` gave them.

    Each takes the place of a random device there that was not moved itself, which takes its place.
    """
    stages, replicas = one.shape
    child = other.copy().ravel()
    slot_of = np.empty(child.size, dtype=np.intp)
    slot_of[child] = np.arange(child.size)
    stage_in_one = np.empty(child.size, dtype=np.intp)
    stage_in_one[one.ravel()] = np.arange(child.size) // replicas
    moved = rng.choice(child.size, size=min(_INHERITED_DEVICES, child.size), replace=False)
    for device in moved:
        target = stage_in_one[device]
        if slot_of[device] // replicas == target:
            continue
        slots = target * replicas + np.arange(replicas)
        free = slots[~np.isin(child[slots], moved)]
        if not len(free):
            continue
        slot, back = int(rng.choice(free)), int(slot_of[device])
        displaced = child[slot]
        child[slot], child[back] = device, displaced
        slot_of[device], slot_of[displaced] = slot, back
    return child.reshape(stages, replicas)


def _first_generation(model: CostModel, stages: int, rng: np.random.Generator, wanted: Evolution) -> Numbers:
    count = model.pairs.num_devices
    drawn = random_layouts(count, stages=stages, count=wanted.random_layouts, rng=rng)
    if wanted.structured:
        hand = np.stack([strided(count, stages=stages).array, contiguous(count, stages=stages).array])
        drawn = np.concatenate([hand, structured_starts(model.pairs, stages=stages), drawn])
    firsts = {key: number for number, key in reversed(list(enumerate(model.keys(drawn))))}
    return drawn[sorted(firsts.values())]
