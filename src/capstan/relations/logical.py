"""The logical algebra: what to compute, said without sites. Every operator is typed when it is built.

    Aggregation   project keys on `group_by`, fold equal keys          Σ
    Join          pairs whose named key components agree               ⋈
    ReKey         another key for each tensor, injectively             ReKey
    Filter        keep the keys that satisfy a condition               σ
    Transform     an element-wise function of each tensor              λ
    Tile          cut a dimension; the piece's number joins the key    Tile
    Concat        glue along a dimension in the order of a component   Concat

Source: Tensor Relational Algebra, PVLDB 14(8), 2021, arXiv 2009.00524.
Differs: a type holds the set of keys and not only their bounds, so what depends on which keys are there
(an injective re-keying, gaps in a Concat, exact sizes) is checked when a plan is built.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from capstan.errors import InputError, UsageError, unknown_name
from capstan.relations.kernels import (
    FOLDS,
    ArrayMap,
    JoinKernel,
    KeyFunction,
    KeyPredicate,
    check_fold_dtype,
)
from capstan.relations.tensor_relation import Key, RelationType, TensorRelation


@dataclass(frozen=True, kw_only=True)
class Logical:
    """An operator and its inputs; `type` is what it returns."""

    def __post_init__(self) -> None:
        assert self.type is not None  # computed now, so that a wrong plan fails where it is written

    @cached_property
    def type(self) -> RelationType:
        raise NotImplementedError

    @property
    def label(self) -> str:
        """One line that says what this operator does."""
        raise NotImplementedError

    @property
    def inputs(self) -> tuple["Logical", ...]:
        return ()

    def with_inputs(self, *inputs: "Logical") -> "Logical":
        """The same operator on other inputs."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(node: "Logical", depth: int = 0) -> list[str]:
    own = f"{'  ' * depth}{node.label}  [{node.type}]"
    return [own, *(line for each in node.inputs for line in _lines(each, depth + 1))]


@dataclass(frozen=True, kw_only=True, eq=False)
class Source(Logical):
    """A relation that is there already."""

    name: str
    relation: TensorRelation

    @cached_property
    def type(self) -> RelationType:
        return self.relation.type

    @property
    def label(self) -> str:
        return self.name

    def with_inputs(self, *inputs: Logical) -> Logical:
        assert not inputs
        return self


@dataclass(frozen=True, kw_only=True)
class _Unary(Logical):
    input: Logical

    @property
    def inputs(self) -> tuple[Logical, ...]:
        return (self.input,)

    def with_inputs(self, *inputs: Logical) -> Logical:
        return replace(self, input=inputs[0])


@dataclass(frozen=True, kw_only=True)
class Aggregation(_Unary):
    """Keys become their components `group_by`, in that order; equal keys are folded."""

    group_by: tuple[int, ...]
    fold: str

    @cached_property
    def type(self) -> RelationType:
        check_components(self.group_by, self.input.type, "group_by")
        if self.fold not in FOLDS:
            raise unknown_name("fold", self.fold, FOLDS)
        check_fold_dtype(self.fold, self.input.type.dtype)
        keys = frozenset(project(key, self.group_by) for key in self.input.type.keys)
        return replace(self.input.type, key_arity=len(self.group_by), keys=keys)

    @property
    def label(self) -> str:
        return f"Σ {self.fold} by {list(self.group_by)}"


@dataclass(frozen=True, kw_only=True)
class Join(Logical):
    """Every pair that agrees on the key components; its key is left's, then right's without its join keys."""

    left: Logical
    right: Logical
    left_keys: tuple[int, ...]
    right_keys: tuple[int, ...]
    kernel: JoinKernel

    @property
    def inputs(self) -> tuple[Logical, ...]:
        return (self.left, self.right)

    def with_inputs(self, *inputs: Logical) -> Logical:
        return replace(self, left=inputs[0], right=inputs[1])

    @cached_property
    def type(self) -> RelationType:
        return join_type(self.left.type, self.right.type, self.left_keys, self.right_keys, self.kernel)

    @property
    def label(self) -> str:
        pairs = ", ".join(f"{a}={b}" for a, b in zip(self.left_keys, self.right_keys, strict=True))
        return f"⋈ [{pairs}] {self.kernel}"


@dataclass(frozen=True, kw_only=True)
class ReKey(_Unary):
    """Key k becomes `function(k)`, which must be injective on the keys that are there."""

    function: KeyFunction

    @cached_property
    def type(self) -> RelationType:
        return rekeyed_type(self.input.type, self.function)

    @property
    def label(self) -> str:
        return f"ReKey {self.function}"


@dataclass(frozen=True, kw_only=True)
class Filter(_Unary):
    """Only the keys that satisfy the predicate."""

    predicate: KeyPredicate

    @cached_property
    def type(self) -> RelationType:
        check_components(self.predicate.reads, self.input.type, "reads")
        return replace(self.input.type, keys=frozenset(filter(self.predicate, self.input.type.keys)))

    @property
    def label(self) -> str:
        return f"σ {self.predicate}"


@dataclass(frozen=True, kw_only=True)
class Transform(_Unary):
    """Each tensor becomes `map(tensor)`, of the same shape."""

    map: ArrayMap

    @cached_property
    def type(self) -> RelationType:
        return self.input.type

    @property
    def label(self) -> str:
        return f"λ {self.map}"


@dataclass(frozen=True, kw_only=True)
class Tile(_Unary):
    """Cut dimension `dim` into pieces of `size`; the piece's number becomes the last key component."""

    dim: int
    size: int

    @cached_property
    def type(self) -> RelationType:
        return tiled_type(self.input.type, self.dim, self.size)

    @property
    def label(self) -> str:
        return f"Tile dim {self.dim} by {self.size}"


@dataclass(frozen=True, kw_only=True)
class Concat(_Unary):
    """Glue along `dim` in the order of key component `key_component`, which disappears."""

    key_component: int
    dim: int

    @cached_property
    def type(self) -> RelationType:
        return concatenated_type(self.input.type, self.key_component, self.dim)

    @property
    def label(self) -> str:
        return f"Concat dim {self.dim} by [{self.key_component}]"


def project(key: Key, components: Sequence[int]) -> Key:
    """The named components of a key."""
    return tuple(key[at] for at in components)


def without(key: Key, components: Sequence[int]) -> Key:
    """A key without the named components."""
    return tuple(value for at, value in enumerate(key) if at not in components)


def check_components(components: Sequence[int], type_: RelationType, what: str) -> None:
    """Refuse key components that are not there or come twice.

    Raises:
        UsageError: one is.
    """
    wrong = [at for at in components if not 0 <= at < type_.key_arity]
    if wrong or len(set(components)) != len(components):
        raise UsageError(
            f"{what}={list(components)} must name different key components below {type_.key_arity}."
        )


def join_type(
    left: RelationType,
    right: RelationType,
    left_keys: tuple[int, ...],
    right_keys: tuple[int, ...],
    kernel: JoinKernel,
) -> RelationType:
    """What a join returns.

    Raises:
        UsageError: the join keys do not pair up.
        InputError: the kernel cannot take these tensors.
    """
    check_components(left_keys, left, "left_keys")
    check_components(right_keys, right, "right_keys")
    if len(left_keys) != len(right_keys):
        raise UsageError(f"left_keys={left_keys} and right_keys={right_keys} must have one length.")
    if (left.dtype, left.library) != (right.dtype, right.library):
        raise InputError(
            f"A join of {left.library} {left.dtype} with {right.library} {right.dtype}: convert one of them."
        )
    kernel.check_dtype(left.dtype)
    by_value: dict[Key, list[Key]] = {}
    for key in right.keys:
        by_value.setdefault(project(key, right_keys), []).append(key)
    keys = frozenset(
        key + without(other, right_keys)
        for key in left.keys
        for other in by_value.get(project(key, left_keys), ())
    )
    return replace(
        left,
        key_arity=left.key_arity + right.key_arity - len(right_keys),
        keys=keys,
        bound=kernel.output_bound(left.bound, right.bound),
    )


def rekeyed_type(type_: RelationType, function: KeyFunction) -> RelationType:
    """The type after a re-keying.

    Raises:
        InputError: two keys become one, or results differ in length.
    """
    origin: dict[Key, Key] = {}
    for key in sorted(type_.keys):
        new = tuple(function(key))
        if new in origin:
            raise InputError(f"{function} sends both {origin[new]} and {key} to {new}; it must be injective.")
        if any(at < 0 for at in new):
            raise InputError(f"{function} sends {key} to {new}; key components count from 0.")
        origin[new] = key
    arities = {len(key) for key in origin} or {type_.key_arity}
    if len(arities) > 1:
        raise InputError(f"{function} returns keys of lengths {sorted(arities)}; one length is needed.")
    return replace(type_, key_arity=arities.pop(), keys=frozenset(origin))


def tiled_type(type_: RelationType, dim: int, size: int) -> RelationType:
    """The type after a Tile.

    Raises:
        UsageError: there is no such dimension, or the size does not divide it.
    """
    if not 0 <= dim < type_.rank:
        raise UsageError(f"There is no dimension {dim} in tensors of shape {type_.bound}.")
    if size < 1 or type_.bound[dim] % size:
        raise UsageError(f"Pieces of {size} do not divide dimension {dim} of shape {type_.bound}.")
    pieces = range(type_.bound[dim] // size)
    return replace(
        type_,
        key_arity=type_.key_arity + 1,
        keys=frozenset((*key, piece) for key in type_.keys for piece in pieces),
        bound=(*type_.bound[:dim], size, *type_.bound[dim + 1 :]),
    )


def concatenated_type(type_: RelationType, component: int, dim: int) -> RelationType:
    """The type after a Concat.

    Raises:
        UsageError: there is no such component or dimension.
        InputError: a tile is missing, so that the results would differ in shape.
    """
    check_components((component,), type_, "key_component")
    if not 0 <= dim < type_.rank:
        raise UsageError(f"There is no dimension {dim} in tensors of shape {type_.bound}.")
    pieces = type_.frontier[component]
    groups: dict[Key, int] = {}
    for rest, members in groupby(sorted(without(key, (component,)) for key in type_.keys)):
        groups[rest] = len(list(members))
    short = next((rest for rest, count in groups.items() if count != pieces), None)
    if short is not None:
        raise InputError(
            f"Concat needs pieces 0 to {pieces - 1} of every key, but {short} has only {groups[short]}: "
            "a tile is missing."
        )
    bound = (*type_.bound[:dim], type_.bound[dim] * pieces, *type_.bound[dim + 1 :])
    return replace(type_, key_arity=type_.key_arity - 1, keys=frozenset(groups), bound=bound)
