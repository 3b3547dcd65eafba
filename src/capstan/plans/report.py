"""The two printouts a user lives with: `explain(plan)` and `compare(plan, trace)`."""

from collections.abc import Mapping
from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table

from capstan.plans.plan import Phase, Plan, Trace
from capstan.plans.sizes import bytes_text, seconds_text

_WIDTH = 100


def explain(plan: Plan) -> str:
    """The plan as text: what was decided and why, what each phase costs, what memory it takes."""
    parts: list[RenderableType] = [f"{plan.system} on {plan.machine} · {plan.title}"]
    if plan.choices:
        parts.append(_choices_table(plan))
    parts.append(_phases_table(plan))
    if plan.budget_bytes or plan.peak_bytes:
        parts.append(_memory_table(plan, measured=None))
    if plan.alternatives:
        parts.append(_alternatives_table(plan))
    if plan.bound:
        parts.append(f"bound: {plan.bound}")
    return _text(*parts)


def compare(plan: Plan, trace: Trace) -> str:
    """Predicted and measured side by side, phase by phase and resource by resource."""
    table = _table("phase", "resource", "bytes", "predicted", "measured", "ratio")
    for phase in plan.phases:
        measured = trace.phase(phase.name)
        if measured is not None:
            _compare_rows(table, phase, measured)
    planned = {phase.name for phase in plan.phases}
    for phase in trace.phases:
        if phase.name not in planned:
            _compare_rows(table, Phase(name=phase.name, seconds=0.0), phase)
    parts: list[RenderableType] = [f"{plan.system} on {trace.machine} · {trace.title}", table]
    if plan.budget_bytes or plan.peak_bytes or trace.peak_bytes:
        parts.append(_memory_table(plan, measured=trace.peak_bytes))
    parts.extend(f"note: {note}" for note in trace.notes)
    return _text(*parts)


def _compare_rows(table: Table, predicted: Phase, measured: Phase) -> None:
    def row(label: str, resource: str, size: str, before: float, after: float) -> None:
        ratio = f"{after / before:.2f}" if before > 0 else ""
        table.add_row(label, resource, size, seconds_text(before), seconds_text(after), ratio)

    row(predicted.name, "wall time", "", predicted.seconds, measured.seconds)
    for resource in sorted({*predicted.busy_s, *measured.busy_s}):
        promised, moved = predicted.traffic.on(resource), measured.traffic.on(resource)
        same = bytes_text(moved) if promised == moved else f"{bytes_text(promised)} / {bytes_text(moved)}"
        size = same if promised or moved else ""
        row("", resource, size, predicted.busy_s.get(resource, 0.0), measured.busy_s.get(resource, 0.0))


def _choices_table(plan: Plan) -> Table:
    table = _table("choice", "value", "because")
    for choice in plan.choices:
        table.add_row(choice.name, choice.value, choice.reason)
    return table


def _phases_table(plan: Plan) -> Table:
    table = _table("phase", "resource", "bytes", "predicted", "share")
    for phase in plan.phases:
        table.add_row(phase.name, "wall time" + _speeds(phase), "", seconds_text(phase.seconds), "")
        for resource, seconds in sorted(phase.busy_s.items()):
            size = phase.traffic.on(resource)
            share = f"{seconds / phase.seconds:.0%}" if phase.seconds else ""
            mark = " <- bottleneck" if resource == phase.bottleneck else ""
            table.add_row("", resource, bytes_text(size) if size else "", seconds_text(seconds), share + mark)
    return table


def _memory_table(plan: Plan, *, measured: Mapping[str, int] | None) -> Table:
    columns = ("memory", "granted", "predicted peak") + (() if measured is None else ("measured peak",))
    table = _table(*columns)
    for name in sorted({*plan.budget_bytes, *plan.peak_bytes, *(measured or {})}):
        cells = [name, _size(plan.budget_bytes, name), _size(plan.peak_bytes, name)]
        table.add_row(*cells, *([] if measured is None else [_size(measured, name)]))
    return table


def _speeds(phase: Phase) -> str:
    """How much of what is counted gets done in a second: `  (120.0 tokens/s)`."""
    if not phase.seconds:
        return ""
    rates = [f"{count / phase.seconds:,.1f} {unit}/s" for unit, count in phase.counts.items() if count]
    return f"  ({', '.join(rates)})" if rates else ""


def _alternatives_table(plan: Plan) -> Table:
    table = _table("instead", "predicted", "because")
    for each in plan.alternatives:
        table.add_row(each.name, seconds_text(each.seconds), each.reason)
    return table


def _size(sizes: Mapping[str, int], name: str) -> str:
    return bytes_text(sizes[name]) if name in sizes else "-"


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    numeric = {"bytes", "predicted", "measured", "ratio", "granted", "predicted peak", "measured peak"}
    for column in columns:
        table.add_column(column, justify="right" if column in numeric else "left")
    return table


def _text(*parts: RenderableType) -> str:
    stream = StringIO()
    Console(
        file=stream,
        width=_WIDTH,
        color_system=None,
        highlight=False,
        markup=False,
        emoji=False,
        force_jupyter=False,
    ).print(Group(*parts))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"
