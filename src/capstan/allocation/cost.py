"""What a layout costs: the paper's step time of data parallelism plus pipeline, for many layouts at once."""

from typing import NamedTuple

import numpy as np

from capstan.allocation.matching import bottleneck_seconds
from capstan.allocation.open_tour import open_tour_seconds
from capstan.allocation.pair_seconds import Numbers, PairSeconds, Seconds

_CHUNK_ENTRIES = 2_000_000
_MOST_REMEMBERED = 2_000_000


class Costs(NamedTuple):
    """One number for each layout, in seconds."""

    data_parallel_s: Seconds
    pipeline_s: Seconds

    @property
    def total_s(self) -> Seconds:
        return self.data_parallel_s + self.pipeline_s


class CostModel:
    """Prices layouts over one network; what it has computed once it remembers.

        data parallel = max over stages C, devices d in C of sum over e in C of data_parallel[d, e]
        edge(C, D) = bottleneck matching of C with D under boundary
        pipeline = 2 × cheapest Hamiltonian path over the stages, by edge
        total = data parallel + pipeline

    A layout is a (stages, replicas) array of device numbers; the order of stages and of members does not
    matter. Stages are remembered by the classes of their devices, since exchangeable devices cost the same:
    in a region-wise network few stages are different.

    Source: DT-FM, arXiv 2206.01288. The paper puts the factor 2 (forward and backward) inside the edge.
    Differs: nothing in the value; see `TrainingTask.tasklet` for the constants.
    """

    def __init__(self, pairs: PairSeconds) -> None:
        self.pairs = pairs
        self._boundary = _among_exchangeable(pairs)
        self._forget()

    def _forget(self) -> None:
        self._stage_numbers: dict[bytes, int] = {}
        self._members: list[Numbers] = []
        self._data_parallel_s: list[float] = []
        self._edges: dict[int, float] = {}
        self._totals: dict[bytes, float] = {}

    def price(self, layouts: Numbers) -> Costs:
        """The costs of (many, stages, replicas) layouts."""
        self._forget_when_full()
        return self._price(layouts)

    def _price(self, layouts: Numbers) -> Costs:
        stages = self._stages(layouts)
        slowest = np.array(self._data_parallel_s)[stages].max(axis=1)
        costs = Costs(slowest, 2 * open_tour_seconds(self._edges_between(stages)))
        keys = np.sort(stages, axis=1)
        for key, total in zip(keys, costs.total_s.tolist(), strict=True):
            self._totals[key.tobytes()] = total
        return costs

    def total_s(self, layouts: Numbers) -> Seconds:
        """The total costs; layouts that were priced before, up to exchangeable devices, are looked up."""
        self._forget_when_full()
        keys = self.keys(layouts)
        unknown: dict[bytes, int] = {}
        for number, key in enumerate(keys):
            if key not in self._totals and key not in unknown:
                unknown[key] = number
        if unknown:
            self._price(layouts[list(unknown.values())])
        return np.array([self._totals[key] for key in keys])

    def keys(self, layouts: Numbers) -> list[bytes]:
        """A key for each layout; those that differ only by exchangeable devices and order have the same."""
        return [key.tobytes() for key in np.sort(self._stages(layouts), axis=1)]

    def edges(self, layout: Numbers) -> Seconds:
        """(stages, stages): the bottleneck matching between every two stages of one layout."""
        edges: Seconds = self._edges_between(self._stages(layout[None]))[0]
        return edges

    def next_best_s(self, best_s: float) -> float | None:
        """The lowest total above `best_s` among all layouts priced so far."""
        # Sums in another order differ in the last bits; such a layout is not second best but the same.
        dearer = [total for total in self._totals.values() if total > best_s * (1 + 1e-12)]
        return min(dearer, default=None)

    @property
    def num_layouts(self) -> int:
        """How many different layouts were priced."""
        return len(self._totals)

    def _forget_when_full(self) -> None:
        # Long walks over many different devices would otherwise fill the memory: about 0.5 GB at the bound.
        if len(self._edges) > _MOST_REMEMBERED:
            self._forget()

    def _stages(self, layouts: Numbers) -> Numbers:
        """(many, stages): the number under which each stage is remembered."""
        many, stages, replicas = layouts.shape
        members = layouts.reshape(-1, replicas)
        kinds = self.pairs.classes[members]
        kinds.sort(axis=1)
        numbers = np.empty(len(members), dtype=np.intp)
        new: list[int] = []
        for row, key in enumerate(kind.tobytes() for kind in kinds):
            number = self._stage_numbers.setdefault(key, len(self._stage_numbers))
            if number == len(self._members):
                self._members.append(members[row].copy())
                new.append(number)
            numbers[row] = number
        if new:
            self._data_parallel_s += self._slowest_device(np.stack([self._members[each] for each in new]))
        return numbers.reshape(many, stages)

    def _slowest_device(self, members: Numbers) -> list[float]:
        chunk = max(1, _CHUNK_ENTRIES // members.shape[1] ** 2)
        found: list[float] = []
        for at in range(0, len(members), chunk):
            part = members[at : at + chunk]
            inside = self.pairs.data_parallel[part[:, :, None], part[:, None, :]]
            found += inside.sum(axis=2).max(axis=1).tolist()
        return found

    def _edges_between(self, stages: Numbers) -> Seconds:
        """(many, stages, stages) for (many, stages) remembered stage numbers."""
        first, second = np.triu_indices(stages.shape[1], k=1)
        low = np.minimum(stages[:, first], stages[:, second])
        high = np.maximum(stages[:, first], stages[:, second])
        keys = (low << 32 | high).ravel().tolist()
        self._match([key for key in dict.fromkeys(keys) if key not in self._edges])
        found = np.array([self._edges[key] for key in keys]).reshape(low.shape)
        edges = np.zeros((*stages.shape, stages.shape[1]))
        edges[:, first, second] = found
        edges[:, second, first] = found
        return edges

    def _match(self, keys: list[int]) -> None:
        if not keys:
            return
        replicas = len(self._members[0])
        chunk = max(1, _CHUNK_ENTRIES // replicas**2)
        for at in range(0, len(keys), chunk):
            part = keys[at : at + chunk]
            one = np.stack([self._members[key >> 32] for key in part])
            other = np.stack([self._members[key & 0xFFFFFFFF] for key in part])
            blocks = self._boundary[one[:, :, None], other[:, None, :]]
            self._edges |= dict(zip(part, bottleneck_seconds(blocks).tolist(), strict=True))


def _among_exchangeable(pairs: PairSeconds) -> Seconds:
    """The boundary matrix with a diagonal for two stages that are remembered by the same devices.

    Such stages hold different devices of the same classes, between which every link costs the same.
    """
    boundary = pairs.boundary.copy()
    for device, kind in enumerate(pairs.classes):
        others = np.flatnonzero(pairs.classes == kind)
        if len(others) > 1:
            boundary[device, device] = boundary[device, others[others != device][0]]
    return boundary


def as_listed_s(pairs: PairSeconds, layouts: Numbers) -> Seconds:
    """What (many, stages, replicas) layouts cost when ranks are used as listed.

    Stages follow each other in their order and member r of a stage sends to member r of the next, as under
    a launcher that knows nothing of the network; data parallelism costs what it always costs.
    """
    inside = pairs.data_parallel[layouts[..., :, None], layouts[..., None, :]]
    slowest = inside.sum(axis=-1).max(axis=(-1, -2))
    steps = pairs.boundary[layouts[:, :-1], layouts[:, 1:]].max(axis=-1)
    total: Seconds = slowest + 2 * steps.sum(axis=-1)
    return total
