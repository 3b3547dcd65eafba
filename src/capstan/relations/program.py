"""An expression as a list of operations on numbered values: what the engine runs, in order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce as fold_list
from math import prod
from typing import Any

import numpy as np

from capstan.relations.arrays import Array, fold
from capstan.relations.elementwise import ElementwiseMap
from capstan.relations.expression import Add, Einsum, Elementwise, Expression, Ones, Tensor, in_order
from capstan.relations.semirings import SUM_PRODUCT, Semiring, contract_one, contract_pair
from capstan.relations.stored_tensor import StoredTensor
from capstan.relations.subscripts import Shape, contraction_steps


@dataclass(frozen=True, kw_only=True)
class Value:
    """A tensor by its number: a leaf with its data, or a result without."""

    shape: Shape
    itemsize: int
    name: str
    data: Any = field(default=None, repr=False)

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.itemsize

    @property
    def is_stored(self) -> bool:
        return isinstance(self.data, StoredTensor)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One contraction or element-wise function. Labels name dimensions; those that `output` lacks are folded.

    `kernel` takes the inputs' tiles; `fold` joins the results over tiles of the folded labels.
    `squeezed` names the dimensions of size 1 to drop from each input.
    """

    name: str
    inputs: tuple[int, ...]
    labels: tuple[str, ...]
    output: str
    result: int
    sizes: Mapping[str, int]
    itemsize: int
    kernel: "Kernel"
    squeezed: tuple[tuple[int, ...], ...]

    @property
    def folded(self) -> str:
        """The labels that are folded away, in order of first occurrence."""
        return "".join(label for label in dict.fromkeys("".join(self.labels)) if label not in self.output)

    @property
    def num_products(self) -> int:
        """How often the inner function is applied."""
        return prod(self.sizes[label] for label in self.output + self.folded)


@dataclass(frozen=True, kw_only=True)
class Contraction:
    """The kernel of an einsum of one or two tensors."""

    labels: tuple[str, ...]
    output: str
    semiring: Semiring

    def __call__(self, tiles: Sequence[Array]) -> Array:
        if len(tiles) == 1:
            return contract_one(self.labels[0], tiles[0], self.output, self.semiring)
        first, second = self.labels
        return contract_pair(first, tiles[0], second, tiles[1], self.output, self.semiring)

    @property
    def fold(self) -> str:
        return self.semiring.add

    def scratch_bytes(self, sizes: Mapping[str, int], itemsize: int) -> int:
        """The most that a call allocates beside its inputs, its result included.

        A matrix multiply copies an input whose dimensions are not in the order that it needs; a label that
        only one input has is folded first, into another copy.
        """

        def size(labels: str) -> int:
            return prod(sizes[label] for label in labels) * itemsize

        copies = 0
        for at, term in enumerate(self.labels):
            others = "".join(self.labels[:at] + self.labels[at + 1 :]) + self.output
            kept = "".join(label for label in dict.fromkeys(term) if label in others)
            copies += size(kept) if kept != term else 0
            if len(self.labels) == 2 and self.semiring == SUM_PRODUCT and self._is_copied(at, kept):
                copies += size(kept)
        results = 1 if self.semiring == SUM_PRODUCT else 2
        return copies + results * size(self.output)

    def _is_copied(self, at: int, kept: str) -> bool:
        other = self.labels[1 - at]
        batch = "".join(label for label in kept if label in other and label in self.output)
        shared = "".join(label for label in self.labels[0] if label in self.labels[1] and label in kept)
        shared = "".join(label for label in dict.fromkeys(shared) if label not in self.output)
        free = "".join(label for label in kept if label not in other)
        # Reshaped in place only where the labels of each group lie side by side; batches are taken as copied.
        return bool(batch) or shared not in kept or free not in kept


@dataclass(frozen=True, kw_only=True)
class MapKernel:
    """The kernel of an element-wise function."""

    map: ElementwiseMap
    fold: str = "sum"

    def __call__(self, tiles: Sequence[Array]) -> Array:
        return self.map(tiles[0])

    def scratch_bytes(self, sizes: Mapping[str, int], itemsize: int) -> int:
        # A sigmoid's slope has four intermediate arrays alive; a comparison is smaller.
        return 4 * prod(sizes.values()) * itemsize


@dataclass(frozen=True, kw_only=True)
class AddKernel:
    """The kernel of a sum of tensors of one shape."""

    fold: str = "sum"

    def __call__(self, tiles: Sequence[Array]) -> Array:
        return fold_list(fold("sum"), tiles)

    def scratch_bytes(self, sizes: Mapping[str, int], itemsize: int) -> int:
        return 2 * prod(sizes.values()) * itemsize


Kernel = Contraction | MapKernel | AddKernel


@dataclass(frozen=True, kw_only=True)
class Program:
    """Values, and the operations that compute those which are no leaves; the last one is the result."""

    values: tuple[Value, ...]
    operations: tuple[Operation, ...]
    result: int
    dtype: str
    library: str

    def last_uses(self) -> dict[int, int]:
        """For every value the number of the last operation that reads it; the result is never done with."""
        last = {value: at for at, operation in enumerate(self.operations) for value in operation.inputs}
        last[self.result] = len(self.operations)
        return last


def lower(root: Expression) -> Program:
    """The operations of an expression, einsums of many operands taken apart into pairs."""
    values: list[Value] = []
    operations: list[Operation] = []
    numbers: dict[int, int] = {}
    itemsize = _itemsize(root)

    def value(shape: Shape, name: str, data: Any = None) -> int:
        values.append(Value(shape=shape, itemsize=itemsize, name=name, data=data))
        return len(values) - 1

    def operation(node: Expression, labels: str, kernel: Kernel) -> int:
        inputs = tuple(numbers[id(each)] for each in node.operands)
        operations.append(
            Operation(
                name=node.label,
                inputs=inputs,
                labels=(labels,) * len(inputs),
                output=labels,
                result=value(node.shape, node.label),
                sizes=dict(zip(labels, node.shape, strict=True)),
                itemsize=itemsize,
                kernel=kernel,
                squeezed=((),) * len(inputs),
            )
        )
        return operations[-1].result

    def contractions(node: Einsum) -> int:
        known = [numbers[id(each)] for each in node.operands]
        squeezed = [*node.subscripts.squeezed]
        for step in contraction_steps(node.subscripts):
            kernel = Contraction(labels=step.labels, output=step.output, semiring=node.semiring)
            shape = tuple(step.sizes[label] for label in step.output)
            name = str(step) if kernel.semiring == SUM_PRODUCT else f"{step} {node.semiring.name}"
            operations.append(
                Operation(
                    name=name,
                    inputs=tuple(known[at] for at in step.inputs),
                    labels=step.labels,
                    output=step.output,
                    result=value(shape, name),
                    sizes=step.sizes,
                    itemsize=itemsize,
                    kernel=kernel,
                    squeezed=tuple(squeezed[at] if at < len(squeezed) else () for at in step.inputs),
                )
            )
            known.append(operations[-1].result)
        return known[-1]

    for node in in_order(root):
        match node:
            case Tensor():
                numbers[id(node)] = value(node.shape, node.name, node.data)
            case Ones():
                numbers[id(node)] = value(node.shape, "ones", _ones(node))
            case Einsum():
                numbers[id(node)] = contractions(node)
            case Elementwise():
                numbers[id(node)] = operation(node, _letters(node.shape), MapKernel(map=node.map))
            case Add():
                numbers[id(node)] = operation(node, _letters(node.shape), AddKernel())
    return Program(
        values=tuple(values),
        operations=tuple(operations),
        result=numbers[id(root)],
        dtype=root.dtype,
        library=root.library,
    )


def _letters(shape: Shape) -> str:
    return "".join(chr(ord("a") + at) for at in range(len(shape)))


def _itemsize(node: Expression) -> int:
    return 2 if node.dtype == "bfloat16" else np.dtype(node.dtype).itemsize


def _ones(node: Ones) -> Array:
    """Ones that take one element of memory, whatever their shape."""
    if node.library == "torch":
        import torch

        return torch.ones((), dtype=getattr(torch, node.dtype)).expand(node.shape)
    return np.broadcast_to(np.ones((), dtype=node.dtype), node.shape)
