"""Rules that turn a logical plan into one that computes the same relation, applied until none is left.

A rule takes a node and returns another one, or None where its side condition does not hold. The families are
those of the paper; the names are ours.

Source: Tensor Relational Algebra, arXiv 2009.00524, equivalence rules.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from capstan.relations.kernels import FusedKernel
from capstan.relations.logical import Aggregation, Filter, Join, Logical, Transform

Rule = Callable[[Logical], Logical | None]


def merge_filters(node: Logical) -> Logical | None:
    """σ_p(σ_q(R)) = σ_(p∧q)(R)."""
    if isinstance(node, Filter) and isinstance(node.input, Filter):
        inner = node.input
        return Filter(input=inner.input, predicate=inner.predicate.conjoined(node.predicate))
    return None


def compose_maps(node: Logical) -> Logical | None:
    """λ_g(λ_h(R)) = λ_(g∘h)(R)."""
    if isinstance(node, Transform) and isinstance(node.input, Transform):
        return Transform(input=node.input.input, map=node.map.after(node.input.map))
    return None


def filter_before_map(node: Logical) -> Logical | None:
    """σ_p(λ_g(R)) = λ_g(σ_p(R)): a map changes no keys."""
    if isinstance(node, Filter) and isinstance(node.input, Transform):
        return replace(node.input, input=replace(node, input=node.input.input))
    return None


def fuse_map_into_join(node: Logical) -> Logical | None:
    """λ_g(⋈_⊗(R, S)) = ⋈_(g∘⊗)(R, S)."""
    if isinstance(node, Transform) and isinstance(node.input, Join):
        return replace(node.input, kernel=FusedKernel(map=node.map, kernel=node.input.kernel))
    return None


def map_before_sum(node: Logical) -> Logical | None:
    """λ_g(Σ_⊕(R)) = Σ_⊕(λ_g(R)) where g distributes over ⊕."""
    if isinstance(node, Transform) and isinstance(node.input, Aggregation):
        inner = node.input
        if inner.fold in node.map.distributes_over:
            return replace(inner, input=replace(node, input=inner.input))
    return None


def map_after_sum(node: Logical) -> Logical | None:
    """The same read from right to left: one map a group instead of one a tuple."""
    if isinstance(node, Aggregation) and isinstance(node.input, Transform):
        inner = node.input
        if node.fold in inner.map.distributes_over:
            return replace(inner, input=replace(node, input=inner.input))
    return None


def filter_before_sum(node: Logical) -> Logical | None:
    """σ_p(Σ_g(R)) = Σ_g(σ_p'(R)): p reads components of the group, p' the same of the whole key."""
    if isinstance(node, Filter) and isinstance(node.input, Aggregation):
        inner = node.input
        predicate = node.predicate.renumbered(inner.group_by)
        return replace(inner, input=Filter(input=inner.input, predicate=predicate))
    return None


def filter_before_join(node: Logical) -> Logical | None:
    """σ_p(⋈(R, S)) = ⋈(σ_p(R), S) where p reads only R's keys, or the same for S."""
    if not (isinstance(node, Filter) and isinstance(node.input, Join)):
        return None
    join = node.input
    reads = set(node.predicate.reads)
    arity = join.left.type.key_arity
    if reads <= set(range(arity)):
        return replace(join, left=Filter(input=join.left, predicate=node.predicate))
    where = _right_components(join)
    if reads <= set(where):
        components = tuple(where.get(at, 0) for at in range(join.type.key_arity))
        predicate = node.predicate.renumbered(components)
        return replace(join, right=Filter(input=join.right, predicate=predicate))
    return None


def _right_components(join: Join) -> dict[int, int]:
    """For components of the joined key the component of the right side's key with the same value."""
    rest = [at for at in range(join.right.type.key_arity) if at not in join.right_keys]
    arity = join.left.type.key_arity
    where = {arity + place: at for place, at in enumerate(rest)}
    return where | dict(zip(join.left_keys, join.right_keys, strict=True))


LOGICAL_RULES: Mapping[str, Rule] = {
    "merge-filters": merge_filters,
    "compose-maps": compose_maps,
    "filter-before-map": filter_before_map,
    "fuse-map-into-join": fuse_map_into_join,
    "map-before-sum": map_before_sum,
    "map-after-sum": map_after_sum,
    "filter-before-sum": filter_before_sum,
    "filter-before-join": filter_before_join,
}
# Those that never cost anything. map-before-sum is left out: it undoes map-after-sum.
_ALWAYS = (
    "merge-filters",
    "compose-maps",
    "map-after-sum",
    "filter-before-map",
    "filter-before-sum",
    "filter-before-join",
    "fuse-map-into-join",
)


def simplify(plan: Logical) -> tuple[Logical, tuple[str, ...]]:
    """Apply the rules that always pay until none applies; the plan, and the rules used in order.

    It ends: filters only move down, maps only up or into another operator.
    """
    used: list[str] = []
    done: dict[int, Logical] = {}

    def rewritten(node: Logical) -> Logical:
        if id(node) not in done:
            inputs = [rewritten(each) for each in node.inputs]
            same = all(a is b for a, b in zip(inputs, node.inputs, strict=True))
            current = node if same else node.with_inputs(*inputs)
            for name in _ALWAYS:
                better = LOGICAL_RULES[name](current)
                if better is not None:
                    used.append(name)
                    current = rewritten(better)
                    break
            done[id(node)] = current
            kept.append(node)
        return done[id(node)]

    kept: list[Logical] = []  # nodes stay alive, so that no id is given twice
    return rewritten(plan), tuple(used)
