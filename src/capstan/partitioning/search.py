"""The layout of least predicted seconds: all of them where they are few, else by pairs and one by one."""

from collections.abc import Callable, Iterator
from itertools import combinations, product

from capstan.partitioning.cost import Workload

MOST_LAYOUTS = 5000  # about a second of predictions
Placed = dict[str, str]


def cheapest(workload: Workload, *, most_layouts: int = MOST_LAYOUTS) -> Placed:
    """The best layout; among those that cost the same, one that moves fewest tables."""
    if workload.num_layouts <= most_layouts:
        return exhaustive(workload)
    return by_pairs(workload)


def exhaustive(workload: Workload) -> Placed:
    """Every combination of candidates."""
    return min(_all(workload), key=_price(workload))


def by_pairs(workload: Workload) -> Placed:
    """Start with none; set or clear the tables of a pair, or one, as long as that is cheaper.

    Pairs, because one side of a join alone gains nothing: going table by table would never begin.
    """
    price = _price(workload)
    chosen: Placed = {}
    while True:
        best = min(_neighbours(workload, chosen), key=price, default=chosen)
        if price(best) >= price(chosen):
            return chosen
        chosen = best


def _price(workload: Workload) -> Callable[[Placed], tuple[float, int]]:
    return lambda layout: (workload.seconds(layout), len(layout))


def _all(workload: Workload) -> Iterator[Placed]:
    tables = list(workload.candidates)
    for keys in product(*((None, *workload.candidates[table]) for table in tables)):
        yield {table: key for table, key in zip(tables, keys, strict=True) if key is not None}


def _neighbours(workload: Workload, layout: Placed) -> Iterator[Placed]:
    settings = {table: (None, *keys) for table, keys in workload.candidates.items()}
    groups = [(table,) for table in settings] + list(combinations(settings, 2))
    for tables in groups:
        for keys in product(*(settings[table] for table in tables)):
            changed = {table: key for table, key in layout.items() if table not in tables}
            changed |= {table: key for table, key in zip(tables, keys, strict=True) if key is not None}
            if changed != layout:
                yield changed
