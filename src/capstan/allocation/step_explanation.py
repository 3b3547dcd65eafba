"""A simulated step as a plan: phases, what crosses links, what each device holds, and what binds."""

from collections import defaultdict
from typing import Any

import numpy as np

from capstan.allocation.layout import layout_to_dict
from capstan.allocation.step_search import Step, StepSearch
from capstan.allocation.step_simulation import StepSimulation
from capstan.allocation.training_step import layer_bytes, step_task
from capstan.plans import Alternative, Choice, Phase, Plan, Traffic, seconds_text

_MOST_RESOURCES_SHOWN = 8


def decision_of(step: Step, names: tuple[str, ...]) -> dict[str, Any]:
    """What a launcher has to know, fit for JSON."""
    return layout_to_dict(step.layout, names) | {
        "ranks": [names[device] for device in step.layout.ranks],
        "layers": list(step.layers),
        "schedule": step.shape.schedule,
        "micro_batches": step.shape.micro_batches,
        "bits": dict(vars(step.shape.bits)),
    }


def plan_of_step(
    found: StepSearch,
    step: Step,
    simulation: StepSimulation,
    *,
    alternatives: tuple[Alternative, ...],
    reason: str,
) -> Plan:
    """The plan of one step: its pipeline until the last backward is done, then what is left of gradients.

    `reason` says why this layout was taken.
    """
    names, layout, shape = found.cluster.names, step.layout, step.shape
    stages, replicas, devices = layout.num_stages, layout.num_replicas, set(names)
    computed_s = max(each.end_s for each in simulation.intervals if each.resource in devices)
    pipeline = Phase(
        name="pipeline",
        seconds=computed_s,
        busy_s=_busy_s(simulation, 0.0, computed_s),
        traffic=_boundary_traffic(found, step),
    )
    exchange = Phase(
        name="gradients",
        seconds=simulation.seconds - computed_s,
        busy_s=_busy_s(simulation, computed_s, simulation.seconds),
        traffic=_exchange_traffic(found, step),
    )
    busiest, busy_s = next(iter(_busy_s(simulation, 0.0, simulation.seconds).items()))
    return Plan(
        system="allocation",
        title=f"{stages} stages × {replicas} replicas, {shape.schedule}, {shape.micro_batches} micro-batches",
        machine=f"{len(names)} devices, {names[0]} … {names[-1]}",
        phases=(pipeline, exchange),
        peak_bytes=_peak_bytes(found, step),
        budget_bytes={name: device.memory_bytes for name, device in found.cluster.devices.items()},
        choices=_choices(found, step, reason),
        decision=decision_of(step, names),
        bound=f"{busiest} is busy for {seconds_text(busy_s)} of {seconds_text(step.seconds)}",
        alternatives=alternatives,
    )


def _busy_s(simulation: StepSimulation, start_s: float, end_s: float) -> dict[str, float]:
    """The resources that work longest in a part of the step, and for how long."""
    busy_s: defaultdict[str, float] = defaultdict(float)
    for each in simulation.intervals:
        busy_s[each.resource] += max(0.0, min(each.end_s, end_s) - max(each.start_s, start_s))
    longest = sorted(busy_s, key=lambda name: -busy_s[name])[:_MOST_RESOURCES_SHOWN]
    return {name: busy_s[name] for name in longest if busy_s[name]}


def _peak_bytes(found: StepSearch, step: Step) -> dict[str, int]:
    """Of the devices whose memory the cluster tells, or of the fullest where it tells none."""
    layout, stages = step.layout, step.layout.num_stages
    of_stage = [
        round(
            count
            * layer_bytes(
                found.goal.task, step.shape, stage=stage, stages=stages, replicas=layout.num_replicas
            )
        )
        for stage, count in enumerate(step.layers)
    ]
    names, told = found.cluster.names, found.cluster.devices
    peak = {
        names[device]: of_stage[stage]
        for stage, group in enumerate(layout.groups)
        for device in group
        if names[device] in told
    }
    return peak or {"each device": max(of_stage)}


def _choices(found: StepSearch, step: Step, reason: str) -> tuple[Choice, ...]:
    shape, bits, speeds = step.shape, step.shape.bits, found.goal.facts.flops_per_s
    return (
        Choice(name="layout", value=step.name, reason=reason),
        Choice(name="layers of each stage", value=", ".join(map(str, step.layers))),
        Choice(name="schedule", value=f"{shape.schedule}, {shape.micro_batches} micro-batches"),
        Choice(
            name="bits",
            value=f"{bits.activations} forward, {bits.activation_gradients} back, {bits.gradients} in stages",
        ),
        Choice(
            name="speed of devices",
            value=f"{min(speeds):.3g} to {max(speeds):.3g} flops/s",
            reason="as the cluster tells, or as assumed for those of which it does not",
        ),
    )


def _boundary_traffic(found: StepSearch, step: Step) -> Traffic:
    task = step_task(found.goal.task, found.goal.facts, step.layout, step.layers, step.shape)
    crossings = (step.layout.num_stages - 1) * step.layout.num_replicas * step.shape.micro_batches
    size = task.message_bytes
    return Traffic(
        {
            ("between stages", "activations"): round(crossings * size["forward"]),
            ("between stages", "gradients"): round(crossings * size["backward"]),
        }
    )


def _exchange_traffic(found: StepSearch, step: Step) -> Traffic:
    task = step_task(found.goal.task, found.goal.facts, step.layout, step.layers, step.shape)
    peers = step.layout.num_replicas - 1
    return Traffic({("within stages", "gradients"): round(2 * peers * float(np.sum(task.gradient_bytes)))})
