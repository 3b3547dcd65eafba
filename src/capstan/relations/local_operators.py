"""The operators of the physical algebra that move nothing: each works on what a site holds.

Which placements an operator can work on is checked when it is built.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from capstan.errors import UsageError
from capstan.relations.kernels import ArrayMap, JoinKernel, KeyFunction, KeyPredicate
from capstan.relations.logical import (
    check_components,
    concatenated_type,
    join_type,
    project,
    rekeyed_type,
    tiled_type,
    without,
)
from capstan.relations.physical import (
    Anywhere,
    Everywhere,
    Held,
    OnOneInput,
    Partial,
    PartitionedBy,
    Physical,
    Placement,
    sorted_sites,
)
from capstan.relations.tensor_relation import Key, RelationType


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalFilter(OnOneInput):
    """Only the keys that satisfy the predicate."""

    predicate: KeyPredicate

    @cached_property
    def type(self) -> RelationType:
        check_components(self.predicate.reads, self.input.type, "reads")
        return replace(self.input.type, keys=frozenset(filter(self.predicate, self.input.type.keys)))

    @cached_property
    def held(self) -> Held:
        return tuple(tuple(filter(self.predicate, keys)) for keys in self.input.held)

    @property
    def label(self) -> str:
        return f"LocalFilter {self.predicate}"


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalMap(OnOneInput):
    """Each tensor by `map`, each key by `rekey`, in place."""

    map: ArrayMap | None = None
    rekey: KeyFunction | None = None

    @cached_property
    def type(self) -> RelationType:
        return self.input.type if self.rekey is None else rekeyed_type(self.input.type, self.rekey)

    @cached_property
    def placement(self) -> Placement:
        if isinstance(self.input.placement, Partial):
            raise UsageError("A map of partial results maps the parts, not their sum; aggregate them first.")
        if self.rekey is None or self.input.placement == Everywhere():
            return self.input.placement
        return Anywhere()

    @cached_property
    def held(self) -> Held:
        if self.rekey is None:
            return self.input.held
        return sorted_sites([tuple(self.rekey(key)) for key in keys] for keys in self.input.held)

    @property
    def label(self) -> str:
        return "LocalMap " + " ".join(str(each) for each in (self.map, self.rekey) if each is not None)


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalTile(OnOneInput):
    """Cut dimension `dim` of each tensor into pieces of `size`."""

    dim: int
    size: int

    @cached_property
    def type(self) -> RelationType:
        return tiled_type(self.input.type, self.dim, self.size)

    @cached_property
    def held(self) -> Held:
        pieces = range(self.input.type.bound[self.dim] // self.size)
        return tuple(tuple((*key, piece) for key in keys for piece in pieces) for keys in self.input.held)

    @property
    def label(self) -> str:
        return f"LocalTile dim {self.dim} by {self.size}"


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalConcat(OnOneInput):
    """Glue along `dim`; the pieces of each key must lie together."""

    key_component: int
    dim: int

    @cached_property
    def type(self) -> RelationType:
        return concatenated_type(self.input.type, self.key_component, self.dim)

    @cached_property
    def placement(self) -> Placement:
        rest = [at for at in range(self.input.type.key_arity) if at != self.key_component]
        return grouped_placement(self.input.placement, tuple(rest), "LocalConcat")

    @cached_property
    def held(self) -> Held:
        return sorted_sites({without(key, (self.key_component,)) for key in keys} for keys in self.input.held)

    @property
    def label(self) -> str:
        return f"LocalConcat dim {self.dim} by [{self.key_component}]"


def grouped_placement(
    placement: Placement, group_by: tuple[int, ...], what: str, *, partial: bool = False
) -> Placement:
    """Where groups come to lie that are whole on one site each; `partial` says whether parts may be folded.

    Raises:
        UsageError: the placement does not keep each group together.
    """
    if placement == Everywhere():
        return Everywhere()
    whole = isinstance(placement, PartitionedBy) or (partial and isinstance(placement, Partial))
    components = getattr(placement, "components", None) if whole else None
    if components is not None and set(components) <= set(group_by):
        return PartitionedBy(tuple(group_by.index(at) for at in components))
    raise UsageError(f"{what} by {list(group_by)} needs each group on one site, but tuples lie {placement}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalAggregate(OnOneInput):
    """Fold the tuples of each group that a site holds.

    With `is_partial` the groups may be spread: what comes are partial results, to be shuffled and folded once
    more. Then tuples must not lie everywhere, or they would count once a site.
    """

    group_by: tuple[int, ...]
    fold: str
    is_partial: bool = False

    @cached_property
    def type(self) -> RelationType:
        check_components(self.group_by, self.input.type, "group_by")
        keys = frozenset(project(key, self.group_by) for key in self.input.type.keys)
        return replace(self.input.type, key_arity=len(self.group_by), keys=keys)

    @cached_property
    def placement(self) -> Placement:
        if self.is_partial:
            if self.input.placement == Everywhere():
                raise UsageError("Partial sums of tuples that lie everywhere would count them once a site.")
            return Partial()
        return grouped_placement(self.input.placement, self.group_by, "LocalAggregate", partial=True)

    @cached_property
    def held(self) -> Held:
        return sorted_sites({project(key, self.group_by) for key in keys} for keys in self.input.held)

    @property
    def label(self) -> str:
        return f"LocalAggregate {self.fold} by {list(self.group_by)}{' partial' if self.is_partial else ''}"


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalJoin(Physical):
    """Join what each site holds: one side lies everywhere, or both by the join keys, pair by pair."""

    left: Physical
    right: Physical
    left_keys: tuple[int, ...]
    right_keys: tuple[int, ...]
    kernel: JoinKernel

    @property
    def inputs(self) -> tuple[Physical, ...]:
        return (self.left, self.right)

    @cached_property
    def type(self) -> RelationType:
        return join_type(self.left.type, self.right.type, self.left_keys, self.right_keys, self.kernel)

    @cached_property
    def placement(self) -> Placement:
        if self.left.num_sites != self.right.num_sites:
            raise UsageError(f"{self.left.num_sites} sites cannot join with {self.right.num_sites}.")
        left, right = self.left.placement, self.right.placement
        if isinstance(left, Partial) or isinstance(right, Partial):
            raise UsageError("Partial results cannot be joined; shuffle and aggregate them first.")
        if right == Everywhere():
            return left
        if left == Everywhere():
            return self._of_right(right)
        if (
            isinstance(left, PartitionedBy)
            and isinstance(right, PartitionedBy)
            and set(left.components) <= set(self.left_keys)
            and tuple(self.right_keys[self.left_keys.index(at)] for at in left.components) == right.components
        ):
            return left
        raise UsageError(
            f"LocalJoin needs one side everywhere or both by their join keys; they lie {left} and {right}."
        )

    def _of_right(self, placement: Placement) -> Placement:
        """The right side's placement in the components of the joined key."""
        if not isinstance(placement, PartitionedBy):
            return placement
        rest = [at for at in range(self.right.type.key_arity) if at not in self.right_keys]
        arity = self.left.type.key_arity
        return PartitionedBy(
            tuple(
                self.left_keys[self.right_keys.index(at)] if at in self.right_keys else arity + rest.index(at)
                for at in placement.components
            )
        )

    @cached_property
    def held(self) -> Held:
        return sorted_sites(
            self._joined(left, right) for left, right in zip(self.left.held, self.right.held, strict=True)
        )

    def _joined(self, left: Sequence[Key], right: Sequence[Key]) -> list[Key]:
        by_value: dict[Key, list[Key]] = {}
        for key in right:
            by_value.setdefault(project(key, self.right_keys), []).append(key)
        return [
            key + without(other, self.right_keys)
            for key in left
            for other in by_value.get(project(key, self.left_keys), ())
        ]

    @property
    def label(self) -> str:
        pairs = ", ".join(f"{a}={b}" for a, b in zip(self.left_keys, self.right_keys, strict=True))
        return f"LocalJoin [{pairs}] {self.kernel}"
