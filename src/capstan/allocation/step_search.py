"""Search under the simulator: the paper's search and structure propose layouts, simulated steps decide."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from capstan.allocation.cost import CostModel
from capstan.allocation.explanation import aligned
from capstan.allocation.layout import Layout, contiguous, strided
from capstan.allocation.messages import Interfaces
from capstan.allocation.pair_seconds import pair_seconds
from capstan.allocation.planner import search_for, searched
from capstan.allocation.starts import structured_starts
from capstan.allocation.step_bound import StepBounds
from capstan.allocation.step_simulation import StepSimulation, simulate_step
from capstan.allocation.task import Tasklet, TrainingTask
from capstan.allocation.training_step import (
    Bits,
    DeviceFacts,
    StepShape,
    layers_by_speed,
    require_room,
    step_task,
    wire_bytes,
)
from capstan.errors import DoesNotFit
from capstan.hardware import Cluster

_MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_STRUCTURED_TRIED = 3
# Sums of the same times in another order differ in their last bits.
_SAME = 1 + 1e-9


@dataclass(frozen=True, kw_only=True)
class Step:
    """Who computes how many layers of which stage, how the step is run, and what the simulator says."""

    name: str
    layout: Layout
    layers: tuple[int, ...]
    shape: StepShape
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StepGoal:
    """What is fixed before the search; None and several bits leave it a choice."""

    task: TrainingTask
    facts: DeviceFacts
    schedules: tuple[str, ...]
    micro_batches: int | None = None
    activation_bits: tuple[int, ...] = (16,)
    gradient_bits: tuple[int, ...] = (16,)
    data_parallel_bits: tuple[int, ...] = (32,)
    interfaces: Interfaces | None = None
    asymmetric: str = "refuse"

    @property
    def fewest_bits(self) -> Bits:
        return Bits(
            activations=min(self.activation_bits),
            activation_gradients=min(self.gradient_bits),
            gradients=min(self.data_parallel_bits),
        )


class StepSearch:
    """Tries layouts in simulated steps and keeps the best; what could not be better is not simulated."""

    def __init__(self, cluster: Cluster, goal: StepGoal) -> None:
        self.cluster = cluster
        self.goal = goal
        self.best: Step | None = None
        self.plain: Step | None = None
        self.too_large: DoesNotFit | None = None
        self.num_simulated = 0
        self._bounds = StepBounds(cluster)

    def simulation(self, step: Step) -> StepSimulation:
        """The step again, with all its intervals."""
        task = step_task(self.goal.task, self.goal.facts, step.layout, step.layers, step.shape)
        return simulate_step(self.cluster, step.layout, task, interfaces=self.goal.interfaces)

    def try_all(self, all_stages: Sequence[int], *, search: str, rng: np.random.Generator) -> None:
        """Proposals with each number of stages, the most promising first; plain layouts before all others.

        The best plain layout is found whole, since it is an alternative and what the best must not be worse
        than.
        """
        count = len(self.cluster.names)
        layouts = {stages: contiguous(count, stages=stages) for stages in all_stages}
        order = sorted(all_stages, key=lambda stages: self._least_s(layouts[stages], even=True))
        for stages in order:
            plain_s = np.inf if self.plain is None else self.plain.seconds
            self.plain = (
                self._best_run("contiguous", layouts[stages], even=True, below_s=plain_s) or self.plain
            )
        self.best = self.plain
        for stages in order:
            for name, layout in self._proposals(stages, search, rng):
                found = self._best_run(name, layout, even=False, below_s=self._best_s)
                self.best = found or self.best

    def try_layout(self, name: str, layout: Layout, *, even: bool = False) -> None:
        """One layout, used as listed."""
        self.best = self._best_run(name, layout, even=even, below_s=self._best_s) or self.best

    def improve_bits(self) -> None:
        """The most bits with which the best step takes no longer: none are given up for nothing."""
        assert self.best is not None
        goal = self.goal
        for field, allowed in (
            ("activations", goal.activation_bits),
            ("activation_gradients", goal.gradient_bits),
            ("gradients", goal.data_parallel_bits),
        ):
            for num_bits in sorted(set(allowed), reverse=True):
                bits = replace(self.best.shape.bits, **{field: num_bits})
                found = self._run(self.best, self.best.shape._replace(bits=bits))
                if found.seconds <= self.best.seconds * _SAME:
                    self.best = found
                    break

    def run_as(
        self,
        name: str,
        layout: Layout,
        shape: StepShape,
        *,
        even: bool = False,
        layers: Sequence[int] | None = None,
        below_s: float = np.inf,
    ) -> Step | None:
        """This layout in just this way, layers as given or by speed.

        None where it does not fit, or where its bound says that it is not below `below_s`.
        """
        task, facts = self.goal.task, self.goal.facts
        try:
            if layers is None:
                layers = layers_by_speed(task, facts, layout, shape, even=even)
            require_room(task, facts, layout, layers, shape)
        except DoesNotFit as error:
            self.too_large = error
            return None
        if self._bounds.seconds(layout, step_task(task, facts, layout, layers, shape)) >= below_s:
            return None
        step = Step(name=name, layout=layout, layers=tuple(layers), shape=shape, seconds=np.inf)
        return self._run(step, shape)

    @property
    def _best_s(self) -> float:
        return np.inf if self.best is None else self.best.seconds

    def _run(self, step: Step, shape: StepShape) -> Step:
        self.num_simulated += 1
        again = replace(step, shape=shape)
        return replace(again, seconds=self.simulation(again).seconds)

    def _best_run(self, name: str, layout: Layout, *, even: bool, below_s: float) -> Step | None:
        """The best schedule and number of micro-batches; None where none is below `below_s`.

        Of layouts that are proposed micro-batches are doubled while that helps, of plain ones to the end: no
        way to run them may be better than what was found.
        """
        best: Step | None = None
        for schedule in self.goal.schedules:
            last_s = np.inf
            for many in self._micro_batches(layout.num_replicas):
                shape = StepShape(schedule, many, self.goal.fewest_bits)
                found = self.run_as(name, layout, shape, even=even, below_s=below_s)
                if found is None:
                    continue
                if found.seconds < below_s:
                    best, below_s = found, found.seconds
                if found.seconds >= last_s and not even:
                    break
                last_s = found.seconds
        return best

    def _least_s(self, layout: Layout, *, even: bool) -> float:
        bounds_s = [
            self._bound_s(layout, StepShape(schedule, many, self.goal.fewest_bits), even)
            for schedule in self.goal.schedules
            for many in self._micro_batches(layout.num_replicas)
        ]
        return min(bounds_s, default=np.inf)

    def _bound_s(self, layout: Layout, shape: StepShape, even: bool) -> float:
        try:
            layers = layers_by_speed(self.goal.task, self.goal.facts, layout, shape, even=even)
        except DoesNotFit as error:
            self.too_large = error
            return np.inf
        task = step_task(self.goal.task, self.goal.facts, layout, layers, shape)
        return self._bounds.seconds(layout, task)

    def _micro_batches(self, replicas: int) -> Sequence[int]:
        samples = max(self.goal.task.batch_tokens / replicas / self.goal.task.sequence_tokens, 1)
        asked = self.goal.micro_batches
        return [many for many in (_MICRO_BATCHES if asked is None else (asked,)) if many <= samples]

    def _proposals(self, stages: int, search: str, rng: np.random.Generator) -> Iterator[tuple[str, Layout]]:
        """Layouts of so many stages.

        Structured ones are ranked as if boundaries were crossed side by side, which many micro-batches come
        close to, the paper's search as if one after the other. Where devices differ, those of one speed go
        into one stage.
        """
        count, facts = len(self.cluster.names), self.goal.facts
        replicas, bits, task = count // stages, self.goal.fewest_bits, self.goal.task
        tasklet = Tasklet(
            gradient_bytes=wire_bytes(task.parameters / stages, bits.gradients),
            activation_bytes=wire_bytes(task.batch_tokens * task.hidden_size / replicas, bits.activations),
        )
        model = CostModel(
            pair_seconds(self.cluster, tasklet, replicas=replicas, asymmetric=self.goal.asymmetric)
        )
        starts = structured_starts(model.pairs, stages=stages)
        costs = model.price(starts)
        side_by_side_s = costs.data_parallel_s + costs.pipeline_s / max(stages - 1, 1)
        for number in np.argsort(side_by_side_s, kind="stable")[:_STRUCTURED_TRIED]:
            yield "structured", aligned(model, starts[number])
        yield "contiguous", contiguous(count, stages=stages)
        yield "strided", aligned(model, strided(count, stages=stages).array)
        if len(set(zip(facts.flops_per_s, facts.memory_bytes, strict=True))) > 1:
            order = sorted(
                range(count), key=lambda each: (-facts.flops_per_s[each], -facts.memory_bytes[each])
            )
            yield "by speed", aligned(model, np.array(order, dtype=np.intp).reshape(stages, replicas))
        name, _ = search_for(search, count, stages)
        yield name, aligned(model, searched(name, model, stages, rng))
