"""Why a layout costs what it costs: the order of stages, the links that bind, and the plan that says so."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from capstan.allocation.cost import CostModel
from capstan.allocation.layout import Layout, layout_to_dict
from capstan.allocation.matching import bottleneck_matching
from capstan.allocation.open_tour import EXACT_STAGES, open_tour
from capstan.allocation.pair_seconds import Numbers
from capstan.allocation.task import Tasklet
from capstan.hardware import Cluster
from capstan.plans import Alternative, Choice, Phase, Plan, Traffic, link_name, seconds_text

_MOST_LINKS_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """The slowest pair between one stage and the next; `seconds` is one way."""

    sender: int
    receiver: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Priced:
    """The two terms of a layout's cost and what determines them.

    `slowest_device` waits longest for its stage's gradients, `waits` says how long for each of its peers.
    """

    data_parallel_s: float
    pipeline_s: float
    slowest_device: int
    waits: tuple[tuple[int, float], ...]
    boundaries: tuple[Boundary, ...]
    stage_s: tuple[float, ...]

    @property
    def total_s(self) -> float:
        return self.data_parallel_s + self.pipeline_s


def aligned(model: CostModel, groups: Numbers) -> Layout:
    """The same stages in the order of the cheapest path, members beside their partners in the matching."""
    order = open_tour(model.edges(groups))
    if groups[order[0]].min() > groups[order[-1]].min():
        order = order[::-1]
    stages = [np.sort(groups[order[0]])]
    for stage in order[1:]:
        members = np.sort(groups[stage])
        matching = bottleneck_matching(model.pairs.boundary[np.ix_(stages[-1], members)])
        stages.append(members[list(matching.partner)])
    return Layout.from_array(np.stack(stages))


def priced(model: CostModel, layout: Layout) -> Priced:
    """The cost of an aligned layout, term by term."""
    groups, pairs = layout.array, model.pairs
    costs = model.price(groups[None])
    waits = np.array([pairs.data_parallel[np.ix_(group, group)].sum(axis=1) for group in groups])
    stage, place = np.unravel_index(waits.argmax(), waits.shape)
    device = int(groups[stage, place])
    peers = [int(peer) for peer in groups[stage] if peer != device]
    steps = pairs.boundary[groups[:-1], groups[1:]]
    boundaries = tuple(
        Boundary(
            sender=int(groups[number, slowest]),
            receiver=int(groups[number + 1, slowest]),
            seconds=float(steps[number, slowest]),
        )
        for number, slowest in enumerate(steps.argmax(axis=1) if len(steps) else ())
    )
    return Priced(
        data_parallel_s=float(costs.data_parallel_s[0]),
        pipeline_s=float(costs.pipeline_s[0]),
        slowest_device=device,
        waits=tuple((peer, float(pairs.data_parallel[device, peer])) for peer in peers),
        boundaries=boundaries,
        stage_s=tuple(float(each) for each in waits.max(axis=1)),
    )


def plan_of(
    cluster: Cluster,
    tasklet: Tasklet,
    layout: Layout,
    found: Priced,
    *,
    choices: Sequence[Choice],
    alternatives: Sequence[Alternative],
    state_bytes: int,
) -> Plan:
    """A priced layout as a plan: one phase for each term, each with the links that determine it."""
    stages, replicas = layout.num_stages, layout.num_replicas
    if stages > EXACT_STAGES:
        reason = f"exact up to {EXACT_STAGES} stages; this order may not be the cheapest"
        choices = (*choices, Choice(name="order of stages", value="2-opt", reason=reason))
    names = cluster.names
    memory = {name: device.memory_bytes for name, device in cluster.devices.items()}
    return Plan(
        system="allocation",
        title=f"{_counted(stages, 'stage')} × {_counted(replicas, 'replica')}",
        machine=f"{_counted(len(names), 'device')}, {names[0]} … {names[-1]}",
        phases=(_data_parallel(names, tasklet, layout, found), _pipeline(names, tasklet, layout, found)),
        peak_bytes=dict.fromkeys(memory or ("each device",), state_bytes),
        budget_bytes=memory,
        choices=tuple(choices),
        decision=layout_to_dict(layout, names) | {"ranks": [names[device] for device in layout.ranks]},
        bound=_bound(names, layout, found),
        alternatives=tuple(alternatives),
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _data_parallel(names: Sequence[str], tasklet: Tasklet, layout: Layout, found: Priced) -> Phase:
    slowest = names[found.slowest_device]
    dearest = sorted(found.waits, key=lambda wait: (-wait[1], wait[0]))[:_MOST_LINKS_SHOWN]
    replicas = layout.num_replicas
    # Every member sends its share to every peer, and gets its peers' sums back.
    size = 2 * layout.num_stages * (replicas - 1) * tasklet.gradient_bytes
    return Phase(
        name="data parallel",
        seconds=found.data_parallel_s,
        busy_s={link_name(slowest, names[peer]): seconds for peer, seconds in dearest},
        traffic=Traffic({("within stages", "gradients"): round(size)}),
    )


def _pipeline(names: Sequence[str], tasklet: Tasklet, layout: Layout, found: Priced) -> Phase:
    one_way = round((layout.num_stages - 1) * layout.num_replicas * tasklet.activation_bytes)
    return Phase(
        name="pipeline",
        seconds=found.pipeline_s,
        busy_s={
            link_name(names[each.sender], names[each.receiver]): 2 * each.seconds for each in found.boundaries
        },
        traffic=Traffic(
            {("between stages", "activations"): one_way, ("between stages", "gradients"): one_way}
        ),
    )


def _bound(names: Sequence[str], layout: Layout, found: Priced) -> str:
    parts = []
    if found.waits:
        stage = next(number for number, group in enumerate(layout.groups) if found.slowest_device in group)
        peer, seconds = max(found.waits, key=lambda wait: wait[1])
        parts.append(
            f"data parallel {seconds_text(found.data_parallel_s)}: in stage {stage} "
            f"{names[found.slowest_device]} waits longest, {seconds_text(seconds)} of it for {names[peer]}"
        )
    if found.boundaries:
        dearest = max(found.boundaries, key=lambda each: each.seconds)
        number = found.boundaries.index(dearest)
        parts.append(
            f"pipeline {seconds_text(found.pipeline_s)}: the dearest boundary is from stage {number} to "
            f"{number + 1}, {seconds_text(2 * dearest.seconds)} both ways by "
            f"{link_name(names[dearest.sender], names[dearest.receiver])}"
        )
    return "; ".join(parts) or "one device: nothing is sent"
