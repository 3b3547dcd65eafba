"""Plans and traces of the house, from a memory plan and from a run of it."""

from typing import TYPE_CHECKING, Any

from capstan.plans import Choice, Phase, Plan, Trace, Traffic, bytes_text, link_name
from capstan.relations.memory_plan import MemoryPlan, OperationPlan
from capstan.relations.rates import Rates

if TYPE_CHECKING:
    from capstan.relations.tile_engine import Run

SYSTEM = "relations"
MACHINE = "this machine"
_READ, _WRITE = link_name("disk", "host"), link_name("host", "disk")


def plan_of(chosen: MemoryPlan, *, title: str, rates: Rates) -> Plan:
    """The prediction: a phase per operation, its seconds by measured rates."""
    budget = {} if chosen.budget_bytes is None else {"host": chosen.budget_bytes}
    return Plan(
        system=SYSTEM,
        title=title,
        machine=MACHINE,
        phases=tuple(_phase(at, each, rates) for at, each in enumerate(chosen.operations)),
        peak_bytes={"host": chosen.peak_bytes},
        budget_bytes=budget,
        choices=(_where(chosen), *(_tiles(at, each) for at, each in enumerate(chosen.operations))),
        decision={
            "threads": chosen.num_threads,
            "operations": [_decision(each) for each in chosen.operations],
        },
        bound="every operand is read and every result written at least once; every product is computed",
    )


def _where(chosen: MemoryPlan) -> Choice:
    if chosen.is_direct:
        return Choice(
            name="execution", value="in memory", reason="everything fits, each contraction one call"
        )
    direct = sum(value.size_bytes for value in chosen.program.values)
    return Choice(
        name="execution",
        value=f"tiles, {chosen.num_threads} at once",
        reason=f"operands and results are {bytes_text(direct)} together",
    )


def _tiles(at: int, each: OperationPlan) -> Choice:
    name = _name(at, each.operation.name)
    where = "to disk" if each.is_result_on_disk else "kept in memory"
    if each.tiling is None:
        return Choice(name=name, value="whole", reason=where)
    return Choice(
        name=name,
        value=f"tiles {each.tiling}",
        reason=f"least read within the budget: {bytes_text(each.read_bytes)}; result {where}",
    )


def _decision(each: OperationPlan) -> dict[str, Any]:
    return {
        "operation": each.operation.name,
        "tiles": None if each.tiling is None else dict(each.tiling.tiles),
        "result": "disk" if each.is_result_on_disk else "memory",
        "read_bytes": each.read_bytes,
        "written_bytes": each.written_bytes,
        "peak_bytes": each.peak_bytes,
    }


def _name(at: int, name: str) -> str:
    return f"{at + 1}: {name}"


def _phase(at: int, each: OperationPlan, rates: Rates) -> Phase:
    compute_s = rates.compute_s(each.operation)
    read_s = each.read_bytes / rates.disk_bytes_per_s
    written_s = each.written_bytes / rates.disk_bytes_per_s
    return Phase(
        name=_name(at, each.operation.name),
        seconds=compute_s + read_s + written_s,
        busy_s=_busy(compute_s, read_s, written_s),
        traffic=_traffic(each.read_bytes, each.written_bytes),
        counts={"products": each.operation.num_products},
    )


def _busy(compute_s: float, read_s: float, written_s: float) -> dict[str, float]:
    found = {"host compute": compute_s, _READ: read_s, _WRITE: written_s}
    return {name: seconds for name, seconds in found.items() if seconds}


def _traffic(read_bytes: int, written_bytes: int) -> Traffic:
    return Traffic({(_READ, "tiles"): read_bytes, (_WRITE, "tiles"): written_bytes})


def trace_of(chosen: MemoryPlan, done: "Run", *, title: str) -> Trace:
    """What the run took, phase by phase as the plan has them."""
    return Trace(
        system=SYSTEM,
        title=title,
        machine=MACHINE,
        phases=tuple(
            Phase(
                name=_name(at, each.name),
                seconds=each.seconds,
                busy_s=_busy(*(each.meter.busy_s[what] for what in ("computed", "read", "written"))),
                traffic=_traffic(each.meter.size_bytes["read"], each.meter.size_bytes["written"]),
            )
            for at, each in enumerate(done.operations)
        ),
        peak_bytes={"host": done.peak_bytes},
    )
