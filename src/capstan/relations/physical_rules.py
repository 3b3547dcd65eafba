"""Rules between physical plans: what may move less, or elsewhere, without another result.

A rule takes a node and returns its equivalents, none where the side condition does not hold. The names are
ours.

Source: Tensor Relational Algebra, arXiv 2009.00524, equivalence rules.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, combinations

from capstan.errors import UsageError
from capstan.relations.local_operators import LocalAggregate, LocalFilter, LocalJoin, LocalMap
from capstan.relations.physical import Broadcast, Everywhere, Partial, PartitionedBy, Physical, Shuffle

PhysicalRule = Callable[[Physical], Iterator[Physical]]


def last_move_counts(node: Physical) -> Iterator[Physical]:
    """A move of what was moved just before goes from where it lay first."""
    if isinstance(node, Broadcast | Shuffle) and isinstance(node.input, Broadcast | Shuffle):
        before = node.input.input
        if not isinstance(before.placement, Partial):
            yield replace(node, input=before)


def needless_move(node: Physical) -> Iterator[Physical]:
    """A move of what lies there already."""
    if isinstance(node, Broadcast) and node.input.placement == Everywhere():
        yield node.input
    if isinstance(node, Shuffle) and node.input.placement == PartitionedBy(node.by):
        yield node.input


def filter_before_move(node: Physical) -> Iterator[Physical]:
    """A filter or an array map commutes with a move; keys that are changed could lie elsewhere."""
    is_local = isinstance(node, LocalFilter) or (isinstance(node, LocalMap) and node.rekey is None)
    if is_local and isinstance(node.inputs[0], Broadcast | Shuffle):
        move = node.inputs[0]
        yield replace(move, input=node.with_inputs(move.input))


def sum_in_place(node: Physical) -> Iterator[Physical]:
    """No shuffle before a sum whose groups lie on one site each already."""
    if isinstance(node, LocalAggregate) and not node.is_partial and isinstance(node.input, Shuffle):
        before = node.input.input
        placement = before.placement
        if placement == Everywhere() or (
            isinstance(placement, PartitionedBy) and set(placement.components) <= set(node.group_by)
        ):
            yield replace(node, input=before)


def two_phase_sum(node: Physical) -> Iterator[Physical]:
    """Sum on each site, shuffle the partial sums, sum again; not of what lies everywhere."""
    if not (isinstance(node, LocalAggregate) and not node.is_partial and isinstance(node.input, Shuffle)):
        return
    before = node.input.input
    if before.placement == Everywhere() or isinstance(before.placement, Partial):
        return
    partial = replace(node, input=before, is_partial=True)
    by = tuple(node.group_by.index(at) for at in node.input.by)
    shuffled = Shuffle(input=partial, by=by)
    yield replace(node, input=shuffled, group_by=tuple(range(len(node.group_by))))


def join_strategies(node: Physical) -> Iterator[Physical]:
    """Broadcast either side, or shuffle both by some of the join keys."""
    if not isinstance(node, LocalJoin):
        return
    left, right = _unmoved(node.left), _unmoved(node.right)
    yield replace(node, left=Broadcast(input=left), right=right)
    yield replace(node, left=left, right=Broadcast(input=right))
    pairs = list(zip(node.left_keys, node.right_keys, strict=True))
    for chosen in chain.from_iterable(combinations(pairs, count) for count in range(1, len(pairs) + 1)):
        by_left, by_right = zip(*chosen, strict=True)
        yield replace(
            node, left=Shuffle(input=left, by=tuple(by_left)), right=Shuffle(input=right, by=tuple(by_right))
        )


def _unmoved(node: Physical) -> Physical:
    return node.input if isinstance(node, Broadcast | Shuffle) else node


def shuffle_by_less(node: Physical) -> Iterator[Physical]:
    """Before a sum, a shuffle by fewer of the group's components brings each group together too."""
    if isinstance(node, LocalAggregate) and not node.is_partial and isinstance(node.input, Shuffle):
        by = node.input.by
        for chosen in chain.from_iterable(combinations(by, count) for count in range(1, len(by))):
            yield replace(node, input=replace(node.input, by=chosen))


PHYSICAL_RULES: Mapping[str, PhysicalRule] = {
    "last-move-counts": last_move_counts,
    "needless-move": needless_move,
    "filter-before-move": filter_before_move,
    "sum-in-place": sum_in_place,
    "two-phase-sum": two_phase_sum,
    "join-strategies": join_strategies,
    "shuffle-by-less": shuffle_by_less,
}


def neighbours(plan: Physical) -> Iterator[tuple[str, Physical]]:
    """Every plan that one rule makes of this one, at any node, with the rule's name.

    A rewriting below may leave an operator above without the placement that it needs: that is no plan.
    """
    for name, rule in PHYSICAL_RULES.items():
        for other in rule(plan):
            yield name, other
    for at, each in enumerate(plan.inputs):
        for name, other in neighbours(each):
            inputs = [*plan.inputs[:at], other, *plan.inputs[at + 1 :]]
            try:
                yield name, plan.with_inputs(*inputs)
            except UsageError:
                continue
