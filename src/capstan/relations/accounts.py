"""Plans and traces of the house, from a memory plan and from a run of it."""

from typing import TYPE_CHECKING

from capstan.plans import Choice, Phase, Plan, Trace, Traffic, bytes_text
from capstan.relations.memory_plan import MemoryPlan, OperationPlan

if TYPE_CHECKING:
    from capstan.relations.tile_engine import Run

SYSTEM = "relations"
MACHINE = "this machine"
# What planning assumes where nobody measured: one core's matrix multiply, a file in the page cache.
PRODUCTS_PER_S = 2e10
DISK_BYTES_PER_S = 1e9


def plan_of(chosen: MemoryPlan, *, title: str) -> Plan:
    """The prediction: a phase per operation."""
    budget = {} if chosen.budget_bytes is None else {"host": chosen.budget_bytes}
    return Plan(
        system=SYSTEM,
        title=title,
        machine=MACHINE,
        phases=tuple(_phase(at, each) for at, each in enumerate(chosen.operations)),
        peak_bytes={"host": chosen.peak_bytes},
        budget_bytes=budget,
        choices=(_where(chosen), *(_tiles(at, each) for at, each in enumerate(chosen.operations))),
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
    name = f"{at + 1}: {each.operation.name}"
    where = "to disk" if each.is_result_on_disk else "kept in memory"
    if each.tiling is None:
        return Choice(name=name, value="whole", reason=where)
    return Choice(
        name=name,
        value=f"tiles {each.tiling}",
        reason=f"least read within the budget: {bytes_text(each.read_bytes)}; result {where}",
    )


def _phase(at: int, each: OperationPlan) -> Phase:
    compute_s = each.operation.num_products / PRODUCTS_PER_S
    disk_s = (each.read_bytes + each.written_bytes) / DISK_BYTES_PER_S
    return Phase(
        name=f"{at + 1}: {each.operation.name}",
        seconds=compute_s + disk_s,
        busy_s={
            "host compute": compute_s,
            "disk->host": each.read_bytes / DISK_BYTES_PER_S,
            "host->disk": each.written_bytes / DISK_BYTES_PER_S,
        },
        traffic=_traffic(each.read_bytes, each.written_bytes),
    )


def _traffic(read_bytes: int, written_bytes: int) -> Traffic:
    return Traffic({("disk->host", "tiles"): read_bytes, ("host->disk", "tiles"): written_bytes})


def trace_of(chosen: MemoryPlan, done: "Run", *, title: str) -> Trace:
    """What the run took, phase by phase as the plan has them."""
    return Trace(
        system=SYSTEM,
        title=title,
        machine=MACHINE,
        phases=tuple(
            Phase(
                name=f"{at + 1}: {each.name}",
                seconds=each.seconds,
                busy_s={
                    "host compute": each.meter.busy_s["computed"],
                    "disk->host": each.meter.busy_s["read"],
                    "host->disk": each.meter.busy_s["written"],
                },
                traffic=_traffic(each.meter.size_bytes["read"], each.meter.size_bytes["written"]),
            )
            for at, each in enumerate(done.operations)
        ),
        peak_bytes={"host": done.peak_bytes},
    )
