"""Canonical terms: what a user's function computes from its row, without the names that it chose.

A `Term` is a node of an expression over the inputs. Terms are built by `term`, which puts equal computations
into one form, so that equal forms mean equal values: operands of `==` and `!=` are sorted, `a > b` is
`b < a`, arithmetic on constants is done, `x[0:5]` is `x[:5]`. `+`, `*`, `and` and `or` keep their order,
because of strings, lists and what Python's `or` returns.
"""

import ast
import hashlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

VERSION = 1  # part of every identity: a reader that builds other forms must not match the old ones
SCALARS = (bool, int, float, str, bytes, type(None))
_FLIPPED = {"gt": "lt", "ge": "le"}
_FOLDED: dict[str, Callable[..., object]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "truediv": operator.truediv,
    "mod": operator.mod,
    "neg": operator.neg,
}
_SIGNS = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "truediv": "/", "mod": "%", "pow": "**"}
_SIGNS |= {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "and": "and", "or": "or", "is": "is", "in": "in"}
_SIGNS |= {"bitand": "&", "bitor": "|", "bitxor": "^", "lshift": "<<", "rshift": ">>", "matmul": "@"}


@dataclass(frozen=True)
class Term:
    """One step of a computation: `kind`, a name or constant that belongs to it, and its operands.

    Kinds: input, constant, attribute, item, slice, method, call (of a known function), tuple, format, if,
    and the names of operators: add, eq, lt, and, not, ...
    """

    kind: str
    name: str = ""
    operands: tuple["Term", ...] = ()

    @cached_property
    def identity(self) -> str:
        """The same for equal computations, whatever function they stand in; 16 hexadecimal digits."""
        parts = [str(VERSION), self.kind, self.name, *(each.identity for each in self.operands)]
        # Lengths keep ("ab", "c") and ("a", "bc") apart.
        text = "".join(f"{len(part)}:{part}" for part in parts)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def walk(self) -> Iterator["Term"]:
        """This term and all below it."""
        yield self
        for each in self.operands:
            yield from each.walk()

    @property
    def has_input(self) -> bool:
        """Whether it depends on the row at all."""
        return any(each.kind == "input" for each in self.walk())

    def __str__(self) -> str:
        texts = [str(each) for each in self.operands]
        match self.kind:
            case "input":
                return "row" if self.name == "0" else f"row{self.name}"
            case "constant":
                return self.name.partition(":")[2]
            case "attribute":
                return f"{texts[0]}.{self.name}"
            case "item":
                return f"{texts[0]}[{texts[1]}]"
            case "slice":
                return f"{texts[0]}[{':'.join('' if text == 'None' else text for text in texts[1:])}]"
            case "method":
                return f"{texts[0]}.{self.name}({', '.join(texts[1:])})"
            case "tuple" | "call" | "format" | "if" | "list":
                return f"{self.name or self.kind}({', '.join(texts)})"
            case kind if kind in _SIGNS and len(texts) == 2:
                return f"({texts[0]} {_SIGNS[kind]} {texts[1]})"
            case _:
                return f"{self.kind}{self.name}({', '.join(texts)})"


def constant(value: object) -> Term:
    """A constant with its type: 1, 1.0 and True are three, 0.0 and -0.0 two."""
    if not isinstance(value, SCALARS):
        raise TypeError(f"{type(value).__name__} is no constant")
    return Term("constant", f"{type(value).__name__}:{value!r}", ())


def row(index: int = 0) -> Term:
    """The function's input number `index`."""
    return Term("input", str(index))


def term(kind: str, *operands: Term, name: str = "") -> Term:
    """A term in canonical form."""
    if kind in _FLIPPED:
        kind, operands = _FLIPPED[kind], operands[::-1]
    if kind in {"eq", "ne"}:
        operands = tuple(sorted(operands, key=lambda each: each.identity))
    if kind == "slice":
        operands = _plain_slice(operands)
    if kind == "if" and operands[0].kind == "not":
        operands = (operands[0].operands[0], operands[2], operands[1])
    folded = _fold(kind, operands) if kind in _FOLDED else None
    return folded or Term(kind, name, operands)


def _fold(kind: str, operands: tuple[Term, ...]) -> Term | None:
    """Arithmetic on constants, done; None where it is not, or would be large."""
    if any(each.kind != "constant" for each in operands):
        return None
    try:
        values = [ast.literal_eval(each.name.partition(":")[2]) for each in operands]
        if kind == "mul" and not all(isinstance(value, int | float) for value in values):
            return None  # a string times a number may be any size
        return constant(_FOLDED[kind](*values))
    except (ArithmeticError, TypeError, ValueError):
        return None  # it fails in the function too; or is inf or nan


def _plain_slice(operands: tuple[Term, ...]) -> tuple[Term, ...]:
    whole, start, stop, step = operands
    if step == constant(1):
        step = constant(None)
    if start == constant(0) and step == constant(None):
        start = constant(None)
    return whole, start, stop, step
