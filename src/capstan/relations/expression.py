"""Expressions: einsums, element-wise maps and sums of tensors, as a graph that nothing has computed yet.

    hidden = relu(einsum("bi,ih->bh", x, w1))
    output = einsum("bh,ho->bo", hidden, w2)

is one value; `compute` plans it as a whole, `gradient` returns another expression.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from capstan.errors import InputError, UsageError
from capstan.relations.arrays import Array, checked_array, dtype_name, library
from capstan.relations.elementwise import ElementwiseMap, elementwise_named
from capstan.relations.semirings import Semiring, semiring_named
from capstan.relations.stored_tensor import StoredTensor, open_npy
from capstan.relations.subscripts import Subscripts, parse_subscripts

Operand = Any


@dataclass(frozen=True, kw_only=True, eq=False)
class Expression:
    """A node of the graph; equal only to itself."""

    @cached_property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def operands(self) -> tuple["Expression", ...]:
        return ()

    @cached_property
    def dtype(self) -> str:
        return self.operands[0].dtype

    @cached_property
    def library(self) -> str:
        return self.operands[0].library

    @property
    def label(self) -> str:
        """One line that says what this node does."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(_lines(self, {}))

    def __add__(self, other: Operand) -> "Expression":
        return add(self, other)

    def __sub__(self, other: Operand) -> "Expression":
        return add(self, apply("negative", other))

    def compute(self, **options: Any) -> Array:
        """Plan and run; the options are those of `relations.compute`."""
        from capstan.relations.computing import compute

        return compute(self, **options)


def _lines(root: Expression, numbers: dict[int, int]) -> Iterator[str]:
    for node in in_order(root):
        numbers[id(node)] = len(numbers)
        inputs = " ".join(f"%{numbers[id(each)]}" for each in node.operands)
        shape = " × ".join(map(str, node.shape)) or "scalar"
        yield f"%{numbers[id(node)]} = {node.label}{' ' + inputs if inputs else ''}  [{shape} {node.dtype}]"


@dataclass(frozen=True, kw_only=True, eq=False)
class Tensor(Expression):
    """An array, or a .npy file that stays on disk."""

    name: str
    data: Array = field(repr=False)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @cached_property
    def dtype(self) -> str:
        return dtype_name(self.data)

    @cached_property
    def library(self) -> str:
        return library(self.data)

    @property
    def is_stored(self) -> bool:
        return isinstance(self.data, StoredTensor)

    @property
    def label(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True, eq=False)
class Ones(Expression):
    """A tensor of ones, like another expression in dtype and library."""

    size: tuple[int, ...]
    like: Expression

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @cached_property
    def dtype(self) -> str:
        return self.like.dtype

    @cached_property
    def library(self) -> str:
        return self.like.library

    @property
    def label(self) -> str:
        return "ones"


@dataclass(frozen=True, kw_only=True, eq=False)
class Einsum(Expression):
    """A contraction of any number of operands."""

    subscripts: Subscripts
    of: tuple[Expression, ...]
    semiring: Semiring

    @property
    def operands(self) -> tuple[Expression, ...]:
        return self.of

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return self.subscripts.output_shape

    @property
    def label(self) -> str:
        return f"einsum {self.subscripts}" + (
            "" if self.semiring.name == "sum-product" else f" {self.semiring.name}"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Elementwise(Expression):
    """A function of each element."""

    map: ElementwiseMap
    of: Expression

    @property
    def operands(self) -> tuple[Expression, ...]:
        return (self.of,)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    @property
    def label(self) -> str:
        return self.map.name


@dataclass(frozen=True, kw_only=True, eq=False)
class Add(Expression):
    """The sum of expressions of one shape."""

    of: tuple[Expression, ...]

    @property
    def operands(self) -> tuple[Expression, ...]:
        return self.of

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return self.of[0].shape

    @property
    def label(self) -> str:
        return "add"


def tensor(data: Any, *, name: str = "") -> Tensor:
    """A leaf of an expression: an array, or an open .npy file.

    Raises:
        InputError: the data are no numbers, or a dimension is empty.
    """
    kept = data if isinstance(data, StoredTensor) else checked_array(data)
    given = str(data) if isinstance(data, StoredTensor) else "tensor"
    return Tensor(name=name or given, data=kept)


def open_tensor(path: Path | str, *, name: str = "") -> Tensor:
    """A leaf that stays in its .npy file and is read by tiles.

    Raises:
        InputError: the file is missing, no .npy or cut short.
    """
    return tensor(open_npy(path), name=name)


def einsum(subscripts: str, *operands: Operand, semiring: str = "sum-product") -> Einsum:
    """The einsum of any number of arrays or expressions, to be computed later.

    `subscripts` are NumPy's, with `...`; `semiring` is sum-product, max-plus, min-plus or or-and.

    Raises:
        UsageError: the subscripts are no einsum of that many operands, or there is no such semiring.
        InputError: shapes or dtypes do not fit together or not with the semiring.
    """
    chosen = semiring_named(semiring)
    nodes = tuple(_expression(each) for each in operands)
    parsed = parse_subscripts(subscripts, [node.shape for node in nodes])
    _check_alike(nodes)
    chosen.check_dtype(nodes[0].dtype)
    return Einsum(subscripts=parsed, of=nodes, semiring=chosen)


def apply(name: str, operand: Operand) -> Elementwise:
    """An element-wise function by its name: relu, exp, tanh, sigmoid, negative, square, step.

    Raises:
        UsageError: there is no such function.
        InputError: the operand is not of real floating-point numbers.
    """
    node = _expression(operand)
    if name != "negative" and not node.dtype.startswith(("float", "bfloat")):
        raise InputError(f"{name} needs floating-point elements, but its operand is {node.dtype}.")
    return Elementwise(map=elementwise_named(name), of=node)


def add(*operands: Operand) -> Expression:
    """The sum of arrays or expressions of one shape; nothing is broadcast.

    Raises:
        InputError: their shapes or dtypes differ.
    """
    nodes = tuple(_expression(each) for each in operands)
    _check_alike(nodes)
    shapes = {node.shape for node in nodes}
    if len(shapes) > 1:
        raise InputError(f"A sum needs one shape, but got {' and '.join(map(str, sorted(shapes)))}.")
    return nodes[0] if len(nodes) == 1 else Add(of=nodes)


def _expression(operand: Operand) -> Expression:
    return operand if isinstance(operand, Expression) else tensor(operand)


def _check_alike(nodes: Sequence[Expression]) -> None:
    if not nodes:
        raise UsageError("At least one operand is needed.")
    kinds = sorted({f"{node.library} {node.dtype}" for node in nodes})
    if len(kinds) > 1:
        raise InputError(
            f"The operands mix {' and '.join(kinds)}. Convert them to one type first; "
            "nothing is converted silently."
        )


def in_order(*roots: Expression) -> tuple[Expression, ...]:
    """Every node once, operands before what uses them."""
    seen: dict[int, Expression] = {}
    waiting = [(root, False) for root in reversed(roots)]
    while waiting:
        node, is_ready = waiting.pop()
        if id(node) in seen:
            continue
        if is_ready:
            seen[id(node)] = node
        else:
            waiting.append((node, True))
            waiting.extend((each, False) for each in reversed(node.operands))
    return tuple(seen.values())
