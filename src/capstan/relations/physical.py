"""The physical algebra: what to compute, and on which site each tensor lies meanwhile.

    Broadcast       every tuple to every site                             -> Everywhere
    Shuffle         tuples to the site that their key components name     -> PartitionedBy

move bytes; those in `local_operators` do not.

A node knows which keys each site holds, so the bytes that it moves are known exactly before anything runs.

Source: Tensor Relational Algebra, arXiv 2009.00524.
Differs: a Shuffle or Broadcast counts only tuples that change site; the paper counts all of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from capstan.errors import UsageError
from capstan.relations.logical import check_components, project
from capstan.relations.tensor_relation import Key, RelationType, TensorRelation


@dataclass(frozen=True)
class Everywhere:
    """Every tuple on every site."""

    def __str__(self) -> str:
        return "everywhere"


@dataclass(frozen=True)
class PartitionedBy:
    """The site of a tuple follows from these key components, in this order."""

    components: tuple[int, ...]

    def __str__(self) -> str:
        return f"by {list(self.components)}"


@dataclass(frozen=True)
class Anywhere:
    """Each tuple on one site, which its key does not name."""

    def __str__(self) -> str:
        return "anywhere"


@dataclass(frozen=True)
class Partial:
    """Parts of one sum under one key, on several sites or, once shuffled by `components`, on one."""

    components: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return "partial" if self.components is None else f"partial by {list(self.components)}"


Placement = Everywhere | PartitionedBy | Anywhere | Partial
# The keys that each site holds, sorted; of partial results a key may come several times.
Held = tuple[tuple[Key, ...], ...]


def site_of(values: Sequence[int], num_sites: int) -> int:
    """The site for values of key components: one function for every shuffle, so that equal values meet."""
    mixed = 0
    for value in values:
        mixed = mixed * 1_000_003 + value
    return mixed % num_sites


@dataclass(frozen=True, kw_only=True, eq=False)
class Physical:
    """An operator on sites. `type` is what it returns, `held` which keys lie where."""

    def __post_init__(self) -> None:
        assert self.placement is not None  # computed now, so that a wrong plan fails where it is written
        assert len(self.held) == self.num_sites

    @property
    def inputs(self) -> tuple["Physical", ...]:
        return ()

    @cached_property
    def num_sites(self) -> int:
        return self.inputs[0].num_sites

    @cached_property
    def type(self) -> RelationType:
        return self.inputs[0].type

    @cached_property
    def placement(self) -> Placement:
        return self.inputs[0].placement

    @cached_property
    def held(self) -> Held:
        raise NotImplementedError

    @property
    def label(self) -> str:
        """One line that says what this operator does."""
        raise NotImplementedError

    @cached_property
    def moved(self) -> tuple[tuple[int, int, Key], ...]:
        """(from site, to site, key) of every tuple that this operator sends."""
        return ()

    @property
    def moved_bytes(self) -> int:
        return len(self.moved) * self.type.tile_bytes

    @cached_property
    def total_bytes(self) -> int:
        """Bytes that this operator and everything below it sends."""
        return self.moved_bytes + sum(each.total_bytes for each in self.inputs)

    def with_inputs(self, *inputs: "Physical") -> "Physical":
        """The same operator on other inputs."""
        names = ("left", "right") if len(inputs) == 2 else ("input",)
        return replace(self, **dict(zip(names, inputs, strict=True)))

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(node: Physical, depth: int = 0) -> list[str]:
    own = f"{'  ' * depth}{node.label}  [{node.placement}; {node.moved_bytes} bytes]"
    return [own, *(line for each in node.inputs for line in _lines(each, depth + 1))]


def sorted_sites(sites: Iterable[Iterable[Key]]) -> Held:
    """The keys of every site in order."""
    return tuple(tuple(sorted(keys)) for keys in sites)


@dataclass(frozen=True, kw_only=True, eq=False)
class Placed(Physical):
    """A relation that lies on the sites already."""

    name: str
    relation: TensorRelation
    at: Everywhere | PartitionedBy
    sites: int

    @cached_property
    def num_sites(self) -> int:
        return self.sites

    @cached_property
    def type(self) -> RelationType:
        return self.relation.type

    @cached_property
    def placement(self) -> Placement:
        if isinstance(self.at, PartitionedBy):
            check_components(self.at.components, self.type, "placement")
        return self.at

    @cached_property
    def held(self) -> Held:
        return _placed(self.type.keys, self.placement, self.num_sites)

    @property
    def label(self) -> str:
        return self.name

    def with_inputs(self, *inputs: Physical) -> Physical:
        return self


def _placed(keys: Iterable[Key], placement: Placement, num_sites: int) -> Held:
    sites: list[set[Key]] = [set() for _ in range(num_sites)]
    for key in keys:
        if isinstance(placement, PartitionedBy):
            sites[site_of(project(key, placement.components), num_sites)].add(key)
        else:
            for site in sites:
                site.add(key)
    return sorted_sites(sites)


@dataclass(frozen=True, kw_only=True, eq=False)
class OnOneInput(Physical):
    """An operator of one relation."""

    input: Physical

    @property
    def inputs(self) -> tuple[Physical, ...]:
        return (self.input,)


@dataclass(frozen=True, kw_only=True, eq=False)
class Broadcast(OnOneInput):
    """Every tuple to the sites that lack it."""

    @cached_property
    def placement(self) -> Placement:
        if isinstance(self.input.placement, Partial):
            raise UsageError("Partial results cannot be broadcast; shuffle and aggregate them first.")
        return Everywhere()

    @cached_property
    def held(self) -> Held:
        return _placed(self.type.keys, self.placement, self.num_sites)

    @cached_property
    def moved(self) -> tuple[tuple[int, int, Key], ...]:
        sent = []
        for key in sorted(self.type.keys):
            holders = {site for site, keys in enumerate(self.input.held) if key in keys}
            sent += [(min(holders), site, key) for site in range(self.num_sites) if site not in holders]
        return tuple(sent)

    @property
    def label(self) -> str:
        return "Broadcast"


@dataclass(frozen=True, kw_only=True, eq=False)
class Shuffle(OnOneInput):
    """Every tuple to the site that its key components name; of copies everywhere, that site keeps its own."""

    by: tuple[int, ...]

    @cached_property
    def placement(self) -> Placement:
        check_components(self.by, self.type, "by")
        if isinstance(self.input.placement, Partial):
            return Partial(self.by)
        return PartitionedBy(self.by)

    def target(self, key: Key) -> int:
        """The site of a key."""
        return site_of(project(key, self.by), self.num_sites)

    @cached_property
    def held(self) -> Held:
        if self.input.placement == Everywhere():
            return _placed(self.type.keys, PartitionedBy(self.by), self.num_sites)
        sites: list[list[Key]] = [[] for _ in range(self.num_sites)]
        for keys in self.input.held:
            for key in keys:
                sites[self.target(key)].append(key)
        return sorted_sites(sites)

    @cached_property
    def moved(self) -> tuple[tuple[int, int, Key], ...]:
        if self.input.placement == Everywhere():
            return ()
        return tuple(
            (site, self.target(key), key)
            for site, keys in enumerate(self.input.held)
            for key in keys
            if self.target(key) != site
        )

    @property
    def label(self) -> str:
        return f"Shuffle by {list(self.by)}"
