"""Which labels of every operation to cut for n devices: EinDecomp's dynamic program.

For a node with join partition p and output partition q, and n parts in each,

    best(node, p) = join(p) + Σ over inputs of  min over q_i of  best(input, q_i) + repart(q_i -> p there)
    best(node, q) = min over p of  best(node, p) + aggregation(p) + repart(p on the output -> q)

A leaf lies in any partition of n parts for nothing. A result that several operations read is decided first
and then stays: where there is none (an expression that is a tree) the plan is optimal.

Source: EinDecomp, arXiv 2410.02682.
Differs: dimensions too small for n parts take as many as they can; sub-plans are frozen values, so that one
that is looked up again cannot have changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from capstan.errors import InputError
from capstan.relations.partition_costs import (
    Parts,
    aggregation_cost,
    check_num_devices,
    join_cost,
    partitions,
    repartition_cost,
)
from capstan.relations.program import Operation, Program


@dataclass(frozen=True, kw_only=True)
class OperationPartition:
    """How one operation is cut: `inputs` are the partitions that its inputs arrive in."""

    operation: Operation
    join: Parts
    inputs: tuple[Parts, ...]
    output: Parts

    @property
    def labels(self) -> str:
        return self.operation.output + self.operation.folded

    @property
    def parts(self) -> dict[str, int]:
        """Parts per label of the join."""
        return dict(zip(self.labels, self.join, strict=True))

    def required(self, at: int) -> Parts:
        """The partition in which the join reads input `at`."""
        return tuple(self.parts[label] for label in self.operation.labels[at])

    @property
    def join_output(self) -> Parts:
        """The partition in which the aggregated result comes out of the join."""
        return tuple(self.parts[label] for label in self.operation.output)

    def costs(self) -> dict[str, int]:
        """Elements touched: join, aggregation, output and each input."""
        operation = self.operation
        size = prod(operation.sizes[label] for label in operation.output)
        found = {
            "join": join_cost(operation.sizes, operation.labels, self.parts),
            "aggregation": aggregation_cost(operation.sizes, operation.output, self.parts),
            "output": repartition_cost(size, self.join_output, self.output),
        }
        for at, before in enumerate(self.inputs):
            input_size = prod(operation.sizes[label] for label in operation.labels[at])
            found[f"input {at + 1}"] = repartition_cost(input_size, before, self.required(at))
        return found


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """A partition for every operation. `cost` is the optimum that the search reported, in elements."""

    program: Program
    num_devices: int
    operations: tuple[OperationPartition, ...]
    cost: int
    is_optimal: bool

    def recomputed_cost(self) -> int:
        """The cost of the partitions themselves, by the formulas."""
        return sum(sum(each.costs().values()) for each in self.operations)


@dataclass(frozen=True)
class _Sub:
    """The best plan of a node in one output partition: its cost, and the operations below and with it."""

    cost: int
    operations: tuple[OperationPartition, ...]


def decompose(program: Program, num_devices: int) -> Decomposition:
    """The cheapest partition of every operation over `num_devices`, a power of two.

    Raises:
        UsageError: the number is no power of two.
        InputError: an operand repeats a label or is broadcast by `...`, which cannot be cut.
    """
    check_num_devices(num_devices)
    users: dict[int, int] = {}
    for operation in program.operations:
        _check_can_be_cut(operation)
        for number in operation.inputs:
            users[number] = users.get(number, 0) + 1
    leaves = {number for number, value in enumerate(program.values) if value.data is not None}
    table: dict[int, Mapping[Parts, _Sub]] = {
        number: {parts: _Sub(0, ()) for parts in partitions(program.values[number].shape, num_devices)}
        for number in leaves
    }
    finished: list[OperationPartition] = []
    total = 0
    is_tree = True
    for operation in program.operations:
        options = _best_by_output(operation, table, num_devices)
        is_shared = users.get(operation.result, 0) > 1
        if is_shared or operation.result == program.result:
            parts, chosen = min(options.items(), key=lambda item: item[1].cost)
            finished += chosen.operations
            total += chosen.cost
            options = {parts: _Sub(0, ())}
            is_tree = is_tree and not is_shared
        table[operation.result] = options
    return Decomposition(
        program=program,
        num_devices=num_devices,
        operations=tuple(finished),
        cost=total,
        is_optimal=is_tree,
    )


def _best_by_output(
    operation: Operation, table: Mapping[int, Mapping[Parts, _Sub]], num_devices: int
) -> dict[Parts, _Sub]:
    labels = operation.output + operation.folded
    shape = tuple(operation.sizes[label] for label in operation.output)
    best: dict[Parts, _Sub] = {}
    for join in partitions(tuple(operation.sizes[label] for label in labels), num_devices):
        parts = dict(zip(labels, join, strict=True))
        inputs: list[Parts] = []
        below: list[OperationPartition] = []
        cost = join_cost(operation.sizes, operation.labels, parts)
        for number, names in zip(operation.inputs, operation.labels, strict=True):
            required = tuple(parts[label] for label in names)
            size = prod(operation.sizes[label] for label in names)
            before, sub, price = _cheapest_input(table[number], size, required)
            inputs.append(before)
            below += sub.operations
            cost += price
        cost += aggregation_cost(operation.sizes, operation.output, parts)
        after = tuple(parts[label] for label in operation.output)
        for output in partitions(shape, num_devices):
            price = cost + repartition_cost(prod(shape), after, output)
            if output not in best or price < best[output].cost:
                own = OperationPartition(operation=operation, join=join, inputs=tuple(inputs), output=output)
                best[output] = _Sub(price, (*below, own))
    return best


def _cheapest_input(options: Mapping[Parts, _Sub], size: int, required: Parts) -> tuple[Parts, _Sub, int]:
    priced = [
        (sub.cost + repartition_cost(size, parts, required), parts, sub) for parts, sub in options.items()
    ]
    price, parts, sub = min(priced, key=lambda item: item[0])
    return parts, sub, price


def _check_can_be_cut(operation: Operation) -> None:
    for at, labels in enumerate(operation.labels):
        if len(set(labels)) != len(labels) or operation.squeezed[at]:
            raise InputError(
                f"{operation.name}: an operand that repeats a label or is broadcast by '...' cannot be cut "
                "over devices yet. Take its diagonal, or name its dimensions, first."
            )
