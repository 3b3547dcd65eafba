"""From a logical plan to the physical plan that sends the fewest bytes.

`compile_default` is the translation that is always right. `optimise` first simplifies the logical plan, then
keeps for every node the cheapest physical plan for each way in which its tuples can lie, because nothing
above depends on more than that. The search covers, at every node: either side of a join broadcast, or both
sides shuffled by any of the join keys; sums in place, after a shuffle by any of the group's components, or
in two phases. Among these plans, and for expressions that are trees, the result is optimal.

To send everything to one site sends little and computes nothing in parallel. So a join counts only if its
busiest site joins at most twice its fair share of the pairs, unless there is no such way to join.

Source: Tensor Relational Algebra, arXiv 2009.00524.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, combinations, permutations
from math import ceil

from capstan.errors import UsageError
from capstan.relations.local_operators import (
    LocalAggregate,
    LocalConcat,
    LocalFilter,
    LocalJoin,
    LocalMap,
    LocalTile,
)
from capstan.relations.logical import (
    Aggregation,
    Concat,
    Filter,
    Join,
    Logical,
    ReKey,
    Source,
    Tile,
    Transform,
)
from capstan.relations.logical_rules import simplify
from capstan.relations.physical import (
    Broadcast,
    Everywhere,
    Held,
    PartitionedBy,
    Physical,
    Placed,
    Placement,
    Shuffle,
)

Where = Callable[[Source], Everywhere | PartitionedBy]


@dataclass(frozen=True, kw_only=True)
class OptimisedPlan:
    """The chosen plan, the default it was compared with, and the logical rules that were used."""

    logical: Logical
    physical: Physical
    default: Physical
    rules: tuple[str, ...]

    def __str__(self) -> str:
        used = ", ".join(self.rules) or "none"
        return (
            f"logical plan, rules used: {used}\n{self.logical}\n"
            f"physical plan, {self.physical.total_bytes} bytes sent; "
            f"the default would send {self.default.total_bytes}\n{self.physical}"
        )


def by_all_keys(source: Source) -> PartitionedBy:
    """The placement of a source where nothing else is known: spread by its whole key."""
    return PartitionedBy(tuple(range(source.type.key_arity)))


def optimise(plan: Logical, *, num_sites: int, where: Where = by_all_keys) -> OptimisedPlan:
    """The physical plan with the fewest bytes sent, of those whose joins are spread over the sites.

    `where` says how a source lies on the sites before anything runs.

    Raises:
        UsageError: there is no site, or a placement names key components that are not there.
    """
    if num_sites < 1:
        raise UsageError(f"num_sites={num_sites}: at least one is needed.")
    simple, rules = simplify(plan)
    options = _options(simple, num_sites, where, {})
    best = min(options.values(), key=lambda each: each.total_bytes)
    default = compile_default(simple, num_sites=num_sites, where=where)
    return OptimisedPlan(logical=simple, physical=best, default=default, rules=rules)


def is_balanced(node: Physical) -> bool:
    """Whether no site does more than twice its fair share of a join; other operators always are."""
    if not isinstance(node, LocalJoin):
        return True
    busiest = max(map(len, node.held))
    return busiest <= 2 * ceil(len(node.type.keys) / node.num_sites)


def compile_default(plan: Logical, *, num_sites: int, where: Where = by_all_keys) -> Physical:
    """What is always right: shuffle before every sum and Concat, broadcast the left side of every join."""
    inputs = [compile_default(each, num_sites=num_sites, where=where) for each in plan.inputs]
    match plan:
        case Source():
            return Placed(name=plan.name, relation=plan.relation, at=where(plan), sites=num_sites)
        case Aggregation():
            return _sum(plan, Shuffle(input=inputs[0], by=plan.group_by))
        case Join():
            return _join(plan, Broadcast(input=inputs[0]), inputs[1])
        case Concat():
            return _concat(plan, Shuffle(input=inputs[0], by=_others(plan)))
    return _in_place(plan, inputs[0])


def _in_place(node: Logical, below: Physical) -> Physical:
    match node:
        case ReKey():
            return LocalMap(input=below, rekey=node.function)
        case Filter():
            return LocalFilter(input=below, predicate=node.predicate)
        case Transform():
            return LocalMap(input=below, map=node.map)
        case Tile():
            return LocalTile(input=below, dim=node.dim, size=node.size)
    raise AssertionError(f"no such operator: {node.label}")


def _sum(node: Aggregation, below: Physical) -> Physical:
    return LocalAggregate(input=below, group_by=node.group_by, fold=node.fold)


def _join(node: Join, left: Physical, right: Physical) -> Physical:
    return LocalJoin(
        left=left,
        right=right,
        left_keys=node.left_keys,
        right_keys=node.right_keys,
        kernel=node.kernel,
    )


def _concat(node: Concat, below: Physical) -> Physical:
    return LocalConcat(input=below, key_component=node.key_component, dim=node.dim)


def _others(node: Concat) -> tuple[int, ...]:
    return tuple(at for at in range(node.input.type.key_arity) if at != node.key_component)


_State = tuple[Placement, Held]


def _options(
    node: Logical, num_sites: int, where: Where, done: dict[int, Mapping[_State, Physical]]
) -> Mapping[_State, Physical]:
    """The cheapest plan of a node for every placement that it can come out in."""
    if id(node) not in done:
        inputs = [list(_options(each, num_sites, where, done).values()) for each in node.inputs]
        best: dict[_State, Physical] = {}
        plans = list(_alternatives(node, inputs, num_sites, where))
        for plan in [each for each in plans if is_balanced(each)] or plans:
            state = (plan.placement, plan.held)
            if state not in best or plan.total_bytes < best[state].total_bytes:
                best[state] = plan
        done[id(node)] = best
    return done[id(node)]


def _alternatives(
    node: Logical, inputs: list[list[Physical]], num_sites: int, where: Where
) -> Iterator[Physical]:
    match node:
        case Source():
            yield Placed(name=node.name, relation=node.relation, at=where(node), sites=num_sites)
        case Aggregation():
            for below in inputs[0]:
                yield from _sums(node, below)
        case Join():
            for left in inputs[0]:
                for right in inputs[1]:
                    yield from _joins(node, left, right)
        case Concat():
            for below in inputs[0]:
                grouped = (below, *(Shuffle(input=below, by=by) for by in _orders(_others(node))))
                yield from _buildable(lambda each: _concat(node, each), grouped)
        case _:
            for below in inputs[0]:
                yield _in_place(node, below)


def _buildable(build: Callable[[Physical], Physical], inputs: tuple[Physical, ...]) -> Iterator[Physical]:
    """What can be built of the inputs: an operator refuses placements that it cannot work on."""
    for each in inputs:
        try:
            yield build(each)
        except UsageError:
            continue


def _sums(node: Aggregation, below: Physical) -> Iterator[Physical]:
    moved = tuple(Shuffle(input=below, by=by) for by in _orders(node.group_by))
    yield from _buildable(lambda each: _sum(node, each), (below, *moved))
    if below.placement == Everywhere():
        return
    partial = LocalAggregate(input=below, group_by=node.group_by, fold=node.fold, is_partial=True)
    whole = tuple(range(len(node.group_by)))
    for by in _orders(whole):
        yield LocalAggregate(input=Shuffle(input=partial, by=by), group_by=whole, fold=node.fold)


def _joins(node: Join, left: Physical, right: Physical) -> Iterator[Physical]:
    yield from _buildable(lambda each: _join(node, each, right), (left,))
    if left.placement != Everywhere():
        yield _join(node, Broadcast(input=left), right)
    if right.placement != Everywhere():
        yield _join(node, left, Broadcast(input=right))
    for by in _orders(node.left_keys):
        partner = tuple(node.right_keys[node.left_keys.index(at)] for at in by)
        yield _join(node, _moved(left, by), _moved(right, partner))


def _moved(node: Physical, by: tuple[int, ...]) -> Physical:
    return node if node.placement == PartitionedBy(by) else Shuffle(input=node, by=by)


def _orders(components: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every choice of components to shuffle by, in every order: another order is another hash."""
    counts = range(min(1, len(components)), len(components) + 1)  # by none only where there are none
    chosen = chain.from_iterable(combinations(components, count) for count in counts)
    return (order for each in chosen for order in permutations(each))
