"""A device slows down or leaves: what becomes of the step, and a plan from where the weights lie now."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from capstan.allocation.layout import Layout
from capstan.allocation.planner import require_devices
from capstan.allocation.step_planner import StepAllocation, allocation_of, fits_nowhere, possible_stages
from capstan.allocation.step_search import Step, StepGoal, StepSearch
from capstan.allocation.training_step import DeviceFacts
from capstan.errors import UsageError, unknown_name
from capstan.hardware import Cluster
from capstan.plans import Alternative, bytes_text

_WEIGHT_BYTES = 4
_MOST_EXCHANGES = 2
# Weights travel over the same slow links as a step: less than this is not worth it.
_WORTH_MOVING = 1.05


@dataclass(frozen=True, kw_only=True)
class Replan:
    """What the change does.

    `unchanged_s` is the step if nobody moves: replicas that lost a device stop and the others take their
    samples; None where no replica is left or its memory does not do. `allocation` is the new plan, on
    `cluster`: the devices that it uses. A move is a device that needs layers which it did not hold;
    `moved_bytes` are their weights in 4 bytes, by device. Adam's moments are twice as much on top.
    """

    before_s: float
    unchanged_s: float | None
    cluster: Cluster
    allocation: StepAllocation
    moved_bytes: Mapping[str, int]

    @property
    def num_moves(self) -> int:
        return len(self.moved_bytes)


@dataclass(frozen=True)
class _Candidate:
    """A way to go on: the devices used, the groups by name, the layers of each stage, and its step."""

    name: str
    search: StepSearch
    step: Step
    moved_bytes: Mapping[str, int]

    @property
    def price(self) -> tuple[float, int]:
        return self.step.seconds, sum(self.moved_bytes.values())


def replan(
    cluster: Cluster,
    current: StepAllocation,
    *,
    slow: Mapping[str, float] | None = None,
    without: Iterable[str] = (),
) -> Replan:
    """A fast step that few moves lead to: of all within a twentieth of the fastest the fewest bytes moved.

    Schedule, micro-batches, bits and the number of stages stay, unless no such step can be run any more: then
    all is planned afresh. Weighed are: nobody moves; each stage fills its holes with its own spare devices,
    which moves nothing; stages with devices to spare help those that lack some; slow devices stay idle;
    layers divided anew by speed; and up to two exchanges of a slow device with another.

    Raises:
        UsageError: no such device, a factor below 1, no device is left, or the step is another cluster's.
        DoesNotFit: what is left has too little memory.
    """
    slow, gone = dict(slow or {}), tuple(dict.fromkeys(without))
    require_devices(current.layout, cluster)
    _require_sense(cluster, slow, gone)
    moving = _Moving(cluster, current, slow, gone)
    unchanged = moving.candidate(
        "nobody moves", moving.complete_replicas(set(moving.left)), current.step.layers
    )
    tried = [each for each in moving.candidates() if each is not None]
    if tried:
        tried.append(moving.exchanged(min(tried, key=lambda each: each.price)))
    else:
        tried.append(moving.afresh())
    fastest_s = min(each.step.seconds for each in tried)
    best = min(
        (each for each in tried if each.step.seconds <= fastest_s * _WORTH_MOVING),
        key=lambda each: each.price[::-1],
    )
    others = {each.price: each for each in reversed(tried) if each.price != best.price}
    alternatives = tuple(
        Alternative(name=each.name, seconds=seconds, reason=f"moves {bytes_text(moved)} of weights")
        for (seconds, moved), each in sorted(others.items())
    )
    return Replan(
        before_s=current.seconds,
        unchanged_s=None if unchanged is None else unchanged.step.seconds,
        cluster=best.search.cluster,
        allocation=allocation_of(
            best.search,
            best.step,
            seed=current.seed,
            search_s=0.0,
            alternatives=alternatives,
            reason="of those about as fast, that which moves least",
        ),
        moved_bytes=best.moved_bytes,
    )


def _require_sense(cluster: Cluster, slow: Mapping[str, float], gone: Sequence[str]) -> None:
    for name in (*slow, *gone):
        if name not in cluster.names:
            raise unknown_name("device", name, cluster.names)
    for name, factor in slow.items():
        if not 1 <= factor < math.inf:
            raise UsageError(f"{name} is slower by a factor of {factor}; give 1 or a finite number above it.")
        if name in gone:
            raise UsageError(f"{name} is slower and gone; give one of the two.")


Groups = list[list[str]]


class _Moving:
    """What is known when devices change: who holds which layers, and how fast everyone is now."""

    def __init__(
        self, cluster: Cluster, current: StepAllocation, slow: Mapping[str, float], gone: Sequence[str]
    ) -> None:
        self.cluster, self.current, self.slow = cluster, current, slow
        self.groups: Groups = [[cluster.names[each] for each in group] for group in current.layout.groups]
        self.left = [name for name in cluster.names if name not in gone]
        if not self.left:
            raise UsageError("No device is left; a step needs one.")
        spans = _spans(current.step.layers)
        self._held = {
            name: set(span) for group, span in zip(self.groups, spans, strict=True) for name in group
        }
        numbers = {name: number for number, name in enumerate(cluster.names)}
        facts = current.goal.facts.slowed({numbers[name]: factor for name, factor in slow.items()})
        self._speed = dict(zip(cluster.names, facts.flops_per_s, strict=True))
        self._memory = dict(zip(cluster.names, facts.memory_bytes, strict=True))

    def complete_replicas(self, alive: set[str]) -> Groups:
        """The replicas that lost nobody."""
        whole = [
            column
            for column in range(len(self.groups[0]))
            if all(group[column] in alive for group in self.groups)
        ]
        return [[group[column] for column in whole] for group in self.groups]

    def candidates(self) -> Iterator[_Candidate | None]:
        """With the slow devices, and as if they had left, too."""
        alive, layers = set(self.left), self.current.step.layers
        for using, those in ((alive, ""), (alive - set(self.slow), ", slow ones idle")):
            own = min(sum(name in using for name in group) for group in self.groups)
            for name, groups in (
                ("nobody moves", self.complete_replicas(using)),
                ("stages fill their own holes", self._refilled(using, own)),
                ("spare devices help other stages", self._refilled(using, len(using) // len(self.groups))),
            ):
                yield self.candidate(name + those, groups, layers)
                yield self.candidate(f"{name}{those}, layers by speed", groups, None)
            if not self.slow:
                return

    def candidate(
        self, name: str, groups: Groups, layers: Sequence[int] | None, *, below_s: float = math.inf
    ) -> _Candidate | None:
        """These groups with these layers, or with layers by speed; None where that cannot be below."""
        if not groups[0]:
            return None
        used = [device for device in self.cluster.names if any(device in group for group in groups)]
        search = StepSearch(self.cluster.subset(used), self._goal(used))
        layout = Layout(groups=tuple(tuple(used.index(device) for device in group) for group in groups))
        try:
            step = search.run_as(name, layout, self.current.step.shape, layers=layers, below_s=below_s)
        except UsageError:
            return None
        if step is None:
            return None
        return _Candidate(name, search, step, self._moved_bytes(groups, step.layers))

    def afresh(self) -> _Candidate:
        """A plan that starts from nothing, with as many stages as are best."""
        search = StepSearch(self.cluster.subset(self.left), self._goal(self.left))
        depths = possible_stages(len(self.left), search.goal.task)
        search.try_all(depths, search="auto", rng=np.random.default_rng(self.current.seed))
        if search.best is None:
            raise fits_nowhere(search, depths)
        search.improve_bits()
        step = replace(search.best, name="planned afresh")
        groups = [[self.left[each] for each in group] for group in step.layout.groups]
        return _Candidate(step.name, search, step, self._moved_bytes(groups, step.layers))

    def exchanged(self, best: _Candidate) -> _Candidate:
        """The best after a slow device has changed places with another, as long as that helps."""
        for _ in range(_MOST_EXCHANGES):
            names, before = best.search.cluster.names, best
            groups = [[names[each] for each in group] for group in before.step.layout.groups]
            for slow in self.slow:
                for swapped in _exchanges(groups, slow):
                    for layers in (before.step.layers, None):
                        name = f"{before.name}, {slow} exchanged"
                        found = self.candidate(name, swapped, layers, below_s=best.step.seconds)
                        if found is not None and found.price < best.price:
                            best = found
            if best is before:
                break
        return best

    def _refilled(self, alive: set[str], replicas: int) -> Groups:
        """So many replicas: those that lost fewest keep their places, spare devices take the holes."""
        columns = range(len(self.groups[0]))
        whole = sorted(columns, key=lambda column: sum(group[column] not in alive for group in self.groups))
        kept = sorted(whole[:replicas])
        places = [[group[column] for column in kept] for group in self.groups]
        spare = [
            [group[column] for column in columns if column not in kept and group[column] in alive]
            for group in self.groups
        ]
        for group, own in zip(places, spare, strict=True):
            for place, name in enumerate(group):
                if name not in alive and own:
                    group[place] = own.pop(0)
        others = [name for own in spare for name in own]
        return [[name if name in alive else others.pop(0) for name in group] for group in places]

    def _goal(self, used: Sequence[str]) -> StepGoal:
        facts = DeviceFacts(
            flops_per_s=tuple(self._speed[name] for name in used),
            memory_bytes=tuple(self._memory[name] for name in used),
        )
        numbers = [self.cluster.names.index(name) for name in used]
        interfaces = self.current.goal.interfaces
        return replace(
            self.current.goal, facts=facts, interfaces=interfaces and interfaces.of_devices(numbers)
        )

    def _moved_bytes(self, groups: Groups, layers: Sequence[int]) -> dict[str, int]:
        of_layer = _WEIGHT_BYTES * self.current.goal.task.parameters / self.current.goal.task.num_layers
        return {
            name: round(len(lacks) * of_layer)
            for group, span in zip(groups, _spans(layers), strict=True)
            for name in group
            if (lacks := set(span) - self._held[name])
        }


def _spans(layers: Sequence[int]) -> list[range]:
    """The layers of each stage by number."""
    ends = [sum(layers[: stage + 1]) for stage in range(len(layers))]
    return [range(end - count, end) for end, count in zip(ends, layers, strict=True)]


def _exchanges(groups: Groups, slow: str) -> Iterator[Groups]:
    """The groups after the slow device has changed places with each device of another stage."""
    home = next((number for number, group in enumerate(groups) if slow in group), None)
    for number, group in enumerate(groups):
        for other in group if home is not None and number != home else ():
            swapped = {slow: other, other: slow}
            yield [[swapped.get(name, name) for name in each] for each in groups]
