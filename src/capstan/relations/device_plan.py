"""A plan over several devices: how each operation is cut, and the bytes that each link carries."""

from dataclasses import dataclass
from typing import Any

from capstan.errors import UsageError
from capstan.plans import Alternative, Choice, Phase, Plan, Traffic, bytes_text
from capstan.relations.accounts import SYSTEM
from capstan.relations.eindecomp import Decomposition, OperationPartition, decompose
from capstan.relations.expression import Expression
from capstan.relations.partition_costs import aggregation_cost, join_cost
from capstan.relations.program import lower
from capstan.relations.rates import ASSUMED, Rates
from capstan.relations.site_traffic import predicted_traffic


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """A decomposition and the account of it."""

    decomposition: Decomposition
    plan: Plan


def plan_for_devices(
    expression: Expression,
    num_devices: int,
    *,
    bandwidth_bytes_per_s: float = 1.25e8,
    rates: Rates = ASSUMED,
) -> DevicePlan:
    """The partition over equal devices that EinDecomp's model calls cheapest; nothing runs.

    Seconds are for devices that compute at `rates` and each receive at `bandwidth_bytes_per_s`, one operation
    after the other.

    Raises:
        UsageError: the number of devices is no power of two, or the bandwidth is not positive.
        InputError: an operand cannot be cut.
    """
    if bandwidth_bytes_per_s <= 0:
        raise UsageError(f"A bandwidth of {bandwidth_bytes_per_s} bytes/s is none; it must be positive.")
    found = decompose(lower(expression), num_devices)
    phases, choices, operations = [], [], []
    for at, each in enumerate(found.operations):
        traffic = predicted_traffic(each)
        name = f"{at + 1}: {each.operation.name}"
        phases.append(_phase(name, each, traffic, num_devices, bandwidth_bytes_per_s, rates))
        choices.append(Choice(name=name, value=_parts(each), reason=_reason(each)))
        operations.append(_operation(each, traffic))
    plan = Plan(
        system=SYSTEM,
        title=expression.label,
        machine=f"{num_devices} devices, {bytes_text(bandwidth_bytes_per_s)}/s each",
        phases=tuple(phases),
        peak_bytes={"device": max((_peak_bytes(each, num_devices) for each in found.operations), default=0)},
        choices=tuple(choices),
        decision={"devices": num_devices, "cost_elements": found.cost, "operations": operations},
        bound="a contracted label that is cut must be summed across devices; an output label that an operand "
        "lacks, where cut, copies that operand",
        alternatives=tuple(_alternatives(found, bandwidth_bytes_per_s)),
    )
    return DevicePlan(decomposition=found, plan=plan)


def _parts(each: OperationPartition) -> str:
    return " ".join(f"{label}/{count}" for label, count in each.parts.items() if count > 1) or "not cut"


def _reason(each: OperationPartition) -> str:
    summed = any(each.parts[label] > 1 for label in each.operation.folded)
    copied = any(
        count > 1 and any(label not in labels for labels in each.operation.labels)
        for label, count in each.parts.items()
    )
    words = [word for word, holds in (("operands copied", copied), ("results summed", summed)) if holds]
    how = " and ".join(words) or "nothing copied or summed"
    costs = each.costs()
    return f"{how}; {sum(costs.values()):,} elements touched"


def _operation(each: OperationPartition, traffic: Traffic) -> dict[str, Any]:
    return {
        "operation": each.operation.name,
        "join": each.parts,
        "inputs": [list(parts) for parts in each.inputs],
        "output": list(each.output),
        "cost_elements": each.costs(),
        "input_bytes": sum(traffic.of("inputs").size_bytes.values()),
        "partial_bytes": sum(traffic.of("partials").size_bytes.values()),
    }


def _phase(
    name: str,
    each: OperationPartition,
    traffic: Traffic,
    num_devices: int,
    bandwidth_bytes_per_s: float,
    rates: Rates,
) -> Phase:
    received = [
        sum(size for (link, _), size in traffic.size_bytes.items() if link.endswith(f"->device {device}"))
        for device in range(num_devices)
    ]
    network_s = max(received) / bandwidth_bytes_per_s
    compute_s = rates.compute_s(each.operation) / num_devices
    return Phase(
        name=name,
        seconds=compute_s + network_s,
        busy_s={"device compute": compute_s, "network": network_s},
        traffic=traffic,
        counts={"products": each.operation.num_products},
    )


def _peak_bytes(each: OperationPartition, num_devices: int) -> int:
    """Largest join's inputs and result, with the blocks that a device keeps of inputs and output."""
    operation = each.operation
    tile = {label: -(-operation.sizes[label] // count) for label, count in each.parts.items()}

    def size(labels: str, sizes: dict[str, int]) -> int:
        total = operation.itemsize
        for label in labels:
            total *= sizes[label]
        return total

    whole = dict(operation.sizes)
    terms = (*operation.labels, operation.output)
    return sum(size(labels, tile) + -(-size(labels, whole) // num_devices) for labels in terms)


def _alternatives(found: Decomposition, bandwidth_bytes_per_s: float) -> list[Alternative]:
    """Joins cut along one label only, priced by elements touched; repartitions not counted."""
    if len(found.operations) != 1:
        return []
    (only,) = found.operations
    operation = only.operation
    result = []
    for label in only.labels:
        if operation.sizes[label] < found.num_devices:
            continue
        parts = {each: found.num_devices if each == label else 1 for each in only.labels}
        touched = join_cost(operation.sizes, operation.labels, parts) + aggregation_cost(
            operation.sizes, operation.output, parts
        )
        result.append(
            Alternative(
                name=f"{label}/{found.num_devices} only",
                seconds=touched * operation.itemsize / found.num_devices / bandwidth_bytes_per_s,
                reason=f"{touched:,} elements touched by join and aggregation",
            )
        )
    return result
