"""From a cluster and a task to a simulated step: depth, width, layers, micro-batches, schedule and bits."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from capstan.allocation.evolution import random_layouts
from capstan.allocation.layout import Layout, strided
from capstan.allocation.messages import Interfaces
from capstan.allocation.planner import require_devices, require_divisible, require_search
from capstan.allocation.step_explanation import plan_of_step
from capstan.allocation.step_search import Step, StepGoal, StepSearch
from capstan.allocation.step_simulation import SCHEDULES, StepSimulation
from capstan.allocation.task import TrainingTask
from capstan.allocation.training_step import UNKNOWN_FLOPS_PER_S, DeviceFacts
from capstan.errors import DoesNotFit, UsageError, unknown_name
from capstan.hardware import Cluster
from capstan.plans import Alternative, Plan

_NUM_RANDOM = 3


@dataclass(frozen=True, kw_only=True)
class StepAllocation:
    """A step as planned: what runs where and how, its simulation, and the plan that explains it."""

    step: Step
    goal: StepGoal
    simulation: StepSimulation
    plan: Plan
    search_s: float
    seed: int

    @property
    def layout(self) -> Layout:
        return self.step.layout

    @property
    def seconds(self) -> float:
        return self.step.seconds


def plan_step(
    cluster: Cluster,
    *,
    stages: int | None = None,
    task: TrainingTask | None = None,
    schedule: str | None = None,
    micro_batches: int | None = None,
    activation_bits: tuple[int, ...] = (16,),
    gradient_bits: tuple[int, ...] = (16,),
    data_parallel_bits: tuple[int, ...] = (32,),
    unknown_flops_per_s: float = UNKNOWN_FLOPS_PER_S,
    interfaces: Interfaces | None = None,
    layout: Layout | None = None,
    search: str = "auto",
    seed: int = 0,
    asymmetric: str = "refuse",
    clock: Callable[[], float] = perf_counter,
) -> StepAllocation:
    """The layout and the way to run it whose simulated step is shortest.

    Args:
        stages: how many; every divisor of the number of devices that leaves each stage a layer unless given.
        schedule, micro_batches: as given, or the best of both schedules and of 1, 2, 4, … 64.
        activation_bits: of activations forward; the fewest that pay among those given.
        gradient_bits: the same of the gradients that come back over boundaries.
        data_parallel_bits: the same of the gradients between replicas.
        unknown_flops_per_s: of devices whose speed the cluster does not tell.
        interfaces: what all transfers of a device together may send and receive.
        layout: this one, used as listed, instead of a search for one.
        search, seed, asymmetric: as for `plan_allocation`, whose search proposes layouts.

    Never slower than the contiguous layout with equal layers, under the simulator, with any of the stages.

    Raises:
        UsageError: devices cannot be divided into the stages, or another argument makes no sense.
        DoesNotFit: the model fits into no layout that was tried.
    """
    require_search(search, seed)
    if layout is not None:
        require_devices(layout, cluster)
    task = task or TrainingTask()
    if schedule is not None and schedule not in SCHEDULES:
        raise unknown_name("schedule", schedule, SCHEDULES)
    goal = StepGoal(
        task=task,
        facts=DeviceFacts.of(cluster, unknown_flops_per_s=unknown_flops_per_s),
        schedules=SCHEDULES if schedule is None else (schedule,),
        micro_batches=micro_batches,
        activation_bits=activation_bits,
        gradient_bits=gradient_bits,
        data_parallel_bits=data_parallel_bits,
        interfaces=interfaces,
        asymmetric=asymmetric,
    )
    depths = possible_stages(len(cluster.names), task, layout.num_stages if layout else stages)
    _require_samples(goal, len(cluster.names) // max(depths))
    begun = clock()
    found = StepSearch(cluster, goal)
    if layout is not None:
        found.try_layout("given", layout)
    else:
        found.try_all(depths, search=search, rng=np.random.default_rng(seed))
    if found.best is None:
        raise fits_nowhere(found, depths)
    found.improve_bits()
    search_s = clock() - begun
    tried = f"the fastest of {found.num_simulated} simulated steps"
    return allocation_of(
        found, found.best, seed=seed, search_s=search_s, reason="used as listed" if layout else tried
    )


def allocation_of(
    found: StepSearch,
    step: Step,
    *,
    seed: int,
    search_s: float,
    reason: str,
    alternatives: tuple[Alternative, ...] = (),
) -> StepAllocation:
    """A step with its simulation and its plan; `reason` says why this layout was taken."""
    simulation = found.simulation(step)
    plan = plan_of_step(
        found,
        step,
        simulation,
        alternatives=(*alternatives, *_alternatives(found, step, seed)),
        reason=reason,
    )
    return StepAllocation(
        step=step, goal=found.goal, simulation=simulation, plan=plan, search_s=search_s, seed=seed
    )


def possible_stages(count: int, task: TrainingTask, stages: int | None = None) -> list[int]:
    """The numbers of stages that so many devices can hold, or the one asked for."""
    if stages is not None:
        require_divisible(count, stages)
        if stages > task.num_layers:
            raise UsageError(
                f"{task.num_layers} layers cannot make {stages} stages; ask for {task.num_layers} at most."
            )
        return [stages]
    return [each for each in range(1, min(count, task.num_layers) + 1) if count % each == 0]


def _require_samples(goal: StepGoal, fewest_replicas: int) -> None:
    many = goal.micro_batches
    if many is None:
        return
    if many < 1:
        raise UsageError(f"A step has at least 1 micro-batch, not {many}.")
    samples = goal.task.batch_tokens / goal.task.sequence_tokens / fewest_replicas
    if many > max(samples, 1):
        raise UsageError(
            f"A replica has {samples:.0f} samples of {goal.task.sequence_tokens:g} tokens in a step, which "
            f"do not make {many} micro-batches; ask for fewer, or for a larger batch."
        )


def fits_nowhere(found: StepSearch, depths: list[int]) -> DoesNotFit:
    """The error that says what a layer takes, and where."""
    facts, task = found.goal.facts, found.goal.task
    return DoesNotFit(
        f"The model fits nowhere: not with {' or '.join(map(str, depths))} stages on "
        f"{len(facts.memory_bytes)} devices. {found.too_large} Take more stages, larger devices or a smaller "
        f"model; {task.parameters:g} parameters have 16 bytes each of weights, gradients and optimizer."
    )


def _alternatives(found: StepSearch, step: Step, seed: int) -> tuple[Alternative, ...]:
    """What people write down, run in the same way; the best of it where the search has looked for that."""
    layout, count = step.layout, len(found.cluster.names)
    listed: list[Alternative] = []
    if found.plain is not None:
        plain, shape = found.plain, found.plain.shape
        reason = f"{plain.layout.num_stages} stages, {shape.schedule}, {shape.micro_batches} micro-batches"
        listed.append(Alternative(name="contiguous", seconds=plain.seconds, reason=reason))
    same = found.run_as("strided", strided(count, stages=layout.num_stages), step.shape)
    if same is not None:
        listed.append(Alternative(name="strided", seconds=same.seconds, reason="as listed, run in this way"))
    drawn = random_layouts(
        count, stages=layout.num_stages, count=_NUM_RANDOM, rng=np.random.default_rng(seed)
    )
    ranks = [found.run_as("random", Layout.from_array(each), step.shape) for each in drawn]
    times = [each.seconds for each in ranks if each is not None]
    if times:
        reason = f"mean of {len(times)}, as drawn, run in this way"
        listed.append(Alternative(name="random ranks", seconds=sum(times) / len(times), reason=reason))
    for schedule in SCHEDULES:
        if schedule != step.shape.schedule:
            other = found.run_as(schedule, layout, step.shape._replace(schedule=schedule))
            if other is not None:
                listed.append(Alternative(name=schedule, seconds=other.seconds, reason="the same otherwise"))
    return tuple(listed)
