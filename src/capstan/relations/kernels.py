"""What is done to tensors inside a relation: kernels join two, maps change one, key functions move them.

Each is a named, printable value. What a rule needs to know about it (does a map distribute over sums?)
is declared with it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from capstan.errors import InputError
from capstan.relations.arrays import Array, fold
from capstan.relations.semirings import SUM_PRODUCT, Semiring, contract_pair
from capstan.relations.subscripts import parse_subscripts
from capstan.relations.tensor_relation import Key

FOLDS = ("sum", "prod", "max", "min", "or", "and")
Bound = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ArrayMap:
    """An element-wise function of one tensor. `distributes_over` names the folds f with
    map(f(a, b)) = f(map(a), map(b))."""

    name: str
    function: Callable[[Array], Array] = field(repr=False)
    distributes_over: frozenset[str] = frozenset()

    def __call__(self, array: Array) -> Array:
        return self.function(array)

    def __str__(self) -> str:
        return self.name

    def after(self, first: "ArrayMap") -> "ArrayMap":
        """`self(first(x))` as one map."""
        return ArrayMap(
            name=f"{self.name}∘{first.name}",
            function=lambda array: self(first(array)),
            distributes_over=self.distributes_over & first.distributes_over,
        )


class JoinKernel(Protocol):
    """A function of two tensors that knows the shape of its result before it runs."""

    def __call__(self, left: Array, right: Array) -> Array: ...

    def output_bound(self, left: Bound, right: Bound) -> Bound:
        """The result's shape, or `InputError`."""
        ...

    def check_dtype(self, dtype: str) -> None:
        """Refuse elements that it cannot join with `InputError`."""
        ...


@dataclass(frozen=True, kw_only=True)
class EinsumKernel:
    """The einsum of two tensors, `"ij,jk->ik"`, in a semiring."""

    subscripts: str
    semiring: Semiring = SUM_PRODUCT

    def __call__(self, left: Array, right: Array) -> Array:
        parsed = parse_subscripts(self.subscripts, [tuple(left.shape), tuple(right.shape)])
        first, second = parsed.inputs
        return contract_pair(first, left, second, right, parsed.output, self.semiring)

    def output_bound(self, left: Bound, right: Bound) -> Bound:
        return parse_subscripts(self.subscripts, [left, right]).output_shape

    def check_dtype(self, dtype: str) -> None:
        self.semiring.check_dtype(dtype)

    def __str__(self) -> str:
        return self.subscripts if self.semiring == SUM_PRODUCT else f"{self.subscripts} {self.semiring.name}"


@dataclass(frozen=True, kw_only=True)
class ElementwiseKernel:
    """A fold of two tensors of one shape, element by element."""

    fold: str

    def __call__(self, left: Array, right: Array) -> Array:
        return fold(self.fold)(left, right)

    def output_bound(self, left: Bound, right: Bound) -> Bound:
        if left != right:
            raise InputError(f"An element-wise {self.fold} needs one shape, but got {left} and {right}.")
        return left

    def check_dtype(self, dtype: str) -> None:
        check_fold_dtype(self.fold, dtype)

    def __str__(self) -> str:
        return self.fold


@dataclass(frozen=True, kw_only=True)
class FusedKernel:
    """A map applied to what a kernel returns, as one kernel."""

    map: ArrayMap
    kernel: JoinKernel

    def __call__(self, left: Array, right: Array) -> Array:
        return self.map(self.kernel(left, right))

    def output_bound(self, left: Bound, right: Bound) -> Bound:
        return self.kernel.output_bound(left, right)

    def check_dtype(self, dtype: str) -> None:
        self.kernel.check_dtype(dtype)

    def __str__(self) -> str:
        return f"{self.map}∘[{self.kernel}]"


@dataclass(frozen=True, kw_only=True)
class KeyFunction:
    """A function from keys to keys."""

    name: str
    function: Callable[[Key], Key] = field(repr=False)

    def __call__(self, key: Key) -> Key:
        return self.function(key)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class KeyPredicate:
    """A condition on a key that reads only the components `reads`, handed to `function` in that order."""

    name: str
    reads: tuple[int, ...]
    function: Callable[..., bool] = field(repr=False)

    def __call__(self, key: Key) -> bool:
        return bool(self.function(*(key[at] for at in self.reads)))

    def __str__(self) -> str:
        return self.name

    def conjoined(self, other: "KeyPredicate") -> "KeyPredicate":
        """True where both are."""
        reads = tuple(dict.fromkeys(self.reads + other.reads))
        places = [tuple(reads.index(at) for at in each.reads) for each in (self, other)]

        def both(*values: int) -> bool:
            first, second = ([values[at] for at in place] for place in places)
            return bool(self.function(*first)) and bool(other.function(*second))

        return KeyPredicate(name=f"{self.name} ∧ {other.name}", reads=reads, function=both)

    def renumbered(self, components: tuple[int, ...]) -> "KeyPredicate":
        """The same condition where component i is now found at `components[i]`."""
        return KeyPredicate(
            name=self.name, reads=tuple(components[at] for at in self.reads), function=self.function
        )


def check_fold_dtype(name: str, dtype: str) -> None:
    """Refuse a fold of elements that it is not meant for.

    Raises:
        InputError: `or`, `and` of numbers, or arithmetic of booleans.
    """
    if (name in {"or", "and"}) != (dtype == "bool"):
        raise InputError(f"The fold {name!r} cannot be used on {dtype} elements.")
