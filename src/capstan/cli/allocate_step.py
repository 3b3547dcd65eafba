"""`capstan allocate` under a simulated step: its options, its plan, and what happens when devices change."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from capstan.errors import UsageError, unknown_name
from capstan.hardware import Cluster

if TYPE_CHECKING:
    from capstan.allocation import Layout, Replan, StepAllocation, TrainingTask


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What only a simulated step has, as on the command line."""

    schedule: str | None = None
    micro_batches: int | None = None
    activation_bits: str | None = None
    gradient_bits: str | None = None
    data_parallel_bits: str | None = None
    layers: int | None = None
    sequence: float | None = None
    device_flops: float | None = None
    nic_gbit: float | None = None
    slow: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    gantt: Path | None = None


def allocate_step(
    network: Cluster,
    task: "TrainingTask",
    asked: StepOptions,
    *,
    stages: int | None,
    layout: Path | None,
    rank_map: Path | None,
    search: str,
    seed: int,
    asymmetric: str,
    as_json: bool,
    named: Mapping[str, str | None],
) -> None:
    """Plan, plan again where devices change, write what was asked for, print."""
    from capstan.allocation import SCHEDULES, UNKNOWN_FLOPS_PER_S, gantt_svg, plan_step, replan
    from capstan.plans import explain
    from capstan.storage import write_atomically

    slow = _slow_devices(asked.slow)
    if asked.schedule is not None and asked.schedule not in (*SCHEDULES, "auto"):
        raise unknown_name("schedule", asked.schedule, (*SCHEDULES, "auto"))
    found = plan_step(
        network,
        stages=stages,
        task=replace(
            task,
            num_layers=task.num_layers if asked.layers is None else asked.layers,
            sequence_tokens=task.sequence_tokens if asked.sequence is None else asked.sequence,
        ),
        schedule=None if asked.schedule == "auto" else asked.schedule,
        micro_batches=asked.micro_batches,
        activation_bits=_bits("--activation-bits", asked.activation_bits, 16),
        gradient_bits=_bits("--gradient-bits", asked.gradient_bits, 16),
        data_parallel_bits=_bits("--data-parallel-bits", asked.data_parallel_bits, 32),
        unknown_flops_per_s=UNKNOWN_FLOPS_PER_S if asked.device_flops is None else asked.device_flops,
        interfaces=_interfaces(asked.nic_gbit, len(network.names)),
        layout=None if layout is None else layout_in(layout, network, stages),
        search=search,
        seed=seed,
        asymmetric=asymmetric,
    )
    change = replan(network, found, slow=slow, without=asked.without) if slow or asked.without else None
    if change is not None:
        found, network = change.allocation, change.cluster
    if asked.gantt is not None:
        write_atomically(asked.gantt, gantt_svg(found.simulation))
    run = {key: found.plan.decision[key] for key in ("layers", "schedule", "micro_batches", "bits")}
    ranks = rank_map and write_rank_map(rank_map, found.layout, network, run)
    if as_json:
        record = {"verb": "allocate", **named} | _record(found) | ({"torchrun": ranks} if ranks else {})
        typer.echo(json.dumps(record | ({"change": _change_record(change)} if change else {})))
        return
    typer.echo(explain(found.plan), nl=False)
    if change is not None:
        typer.echo(_change_text(change))
    typer.echo(groups_text(found.layout, network))
    for line in ranks or ():
        typer.echo(line)


def layout_in(path: Path, network: Cluster, stages: int | None) -> "Layout":
    """The layout in a file, which has as many stages as asked for."""
    from capstan.allocation import read_layout

    layout = read_layout(path, network.names)
    if stages not in (None, layout.num_stages):
        raise UsageError(f"{path} has {layout.num_stages} stages, but --stages asks for {stages}.")
    return layout


def write_rank_map(
    path: Path, layout: "Layout", network: Cluster, run: dict[str, Any] | None = None
) -> tuple[str, ...]:
    """Write the file; the torchrun command of every rank."""
    from capstan.allocation import RankMap
    from capstan.storage import write_atomically

    ranks = RankMap.of(layout, network.names, run)
    write_atomically(path, ranks.to_json())
    return ranks.torchrun_lines()


def groups_text(layout: "Layout", network: Cluster) -> str:
    """One line for each stage, in pipeline order, with its devices in the order of replicas."""
    lines = [
        f"stage {stage}: {', '.join(network.names[device] for device in group)}"
        for stage, group in enumerate(layout.groups)
    ]
    return "\n".join(lines)


def _bits(option: str, text: str | None, unless_given: int) -> tuple[int, ...]:
    if text is None:
        return (unless_given,)
    try:
        return tuple(int(each) for each in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} is {text!r}; give a number of bits, or several as 4,8,16.") from error


def _slow_devices(texts: tuple[str, ...]) -> dict[str, float]:
    slow: dict[str, float] = {}
    for text in texts:
        name, _, factor = text.rpartition("=")
        try:
            value = float(factor)
        except ValueError:
            name = ""
        if not name:
            raise UsageError(f"--slow is {text!r}; give DEVICE=FACTOR, as tokyo-3=2 for half the speed.")
        if name in slow:
            raise UsageError(f"--slow has {name} twice; give each device once.")
        slow[name] = value
    return slow


def _interfaces(gbit: float | None, count: int) -> Any:
    from capstan.allocation import Interfaces

    if gbit is None:
        return None
    rates = (gbit * 1e9 / 8,) * count
    return Interfaces(up_bytes_per_s=rates, down_bytes_per_s=rates)


def _record(found: "StepAllocation") -> dict[str, Any]:
    decision = found.plan.decision
    return {
        "layout": {"groups": decision["groups"]},
        "step_s": found.seconds,
        "layers": decision["layers"],
        "schedule": decision["schedule"],
        "micro_batches": decision["micro_batches"],
        "bits": decision["bits"],
        "search_s": found.search_s,
        "seed": found.seed,
        "plan": found.plan.to_dict(),
    }


def _change_record(change: "Replan") -> dict[str, Any]:
    return {
        "before_s": change.before_s,
        "unchanged_s": change.unchanged_s,
        "after_s": change.allocation.seconds,
        "moves": change.num_moves,
        "moved_bytes": dict(change.moved_bytes),
    }


def _change_text(change: "Replan") -> str:
    from capstan.plans import bytes_text, seconds_text

    unchanged = (
        "no replica can go on" if change.unchanged_s is None else f"{seconds_text(change.unchanged_s)} a step"
    )
    moved = bytes_text(sum(change.moved_bytes.values()))
    return (
        f"before the change {seconds_text(change.before_s)} a step; where nobody moves {unchanged}; as "
        f"planned here {seconds_text(change.allocation.seconds)}, after {change.num_moves} moves, {moved} of "
        "weights"
    )
