"""Logical plans computed the obvious way, in memory: what every other engine is compared with."""

from collections.abc import Iterable, Mapping, Sequence

from capstan.relations.arrays import Array, concatenate, fold
from capstan.relations.kernels import JoinKernel
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
    project,
    without,
)
from capstan.relations.tensor_relation import Key, TensorRelation

Item = tuple[Key, Array]


def evaluate(plan: Logical) -> TensorRelation:
    """Compute a logical plan; an input that is used twice is computed once."""
    done: dict[int, Mapping[Key, Array]] = {}

    def tiles(node: Logical) -> Mapping[Key, Array]:
        if id(node) not in done:
            done[id(node)] = dict(_apply(node, [tiles(each).items() for each in node.inputs]))
        return done[id(node)]

    return TensorRelation.from_items(tiles(plan).items(), like=plan.type)


def _apply(node: Logical, inputs: Sequence[Iterable[Item]]) -> Iterable[Item]:
    match node:
        case Source():
            return node.relation.tiles.items()
        case Aggregation():
            return aggregate(inputs[0], node.group_by, node.fold)
        case Join():
            return join(inputs[0], inputs[1], node.left_keys, node.right_keys, node.kernel)
        case ReKey():
            return [(node.function(key), tensor) for key, tensor in inputs[0]]
        case Filter():
            return [(key, tensor) for key, tensor in inputs[0] if node.predicate(key)]
        case Transform():
            return [(key, node.map(tensor)) for key, tensor in inputs[0]]
        case Tile():
            return cut(inputs[0], node.dim, node.size)
        case Concat():
            return glue(inputs[0], node.key_component, node.dim)
    raise AssertionError(f"no such operator: {node}")


def aggregate(items: Iterable[Item], group_by: Sequence[int], name: str) -> list[Item]:
    """Fold the tensors whose keys agree on `group_by`."""
    add = fold(name)
    totals: dict[Key, Array] = {}
    for key, tensor in items:
        group = project(key, group_by)
        totals[group] = add(totals[group], tensor) if group in totals else tensor
    return list(totals.items())


def join(
    left: Iterable[Item],
    right: Iterable[Item],
    left_keys: Sequence[int],
    right_keys: Sequence[int],
    kernel: JoinKernel,
) -> list[Item]:
    """A hash join on the named key components."""
    by_value: dict[Key, list[Item]] = {}
    for key, tensor in right:
        by_value.setdefault(project(key, right_keys), []).append((key, tensor))
    return [
        (key + without(other, right_keys), kernel(tensor, partner))
        for key, tensor in left
        for other, partner in by_value.get(project(key, left_keys), ())
    ]


def cut(items: Iterable[Item], dim: int, size: int) -> list[Item]:
    """Each tensor in pieces of `size` along `dim`."""
    before = (slice(None),) * dim
    return [
        ((*key, piece), tensor[(*before, slice(piece * size, (piece + 1) * size))])
        for key, tensor in items
        for piece in range(tensor.shape[dim] // size)
    ]


def glue(items: Iterable[Item], component: int, dim: int) -> list[Item]:
    """The tensors that differ in one key component only, side by side along `dim`."""
    groups: dict[Key, list[tuple[int, Array]]] = {}
    for key, tensor in items:
        groups.setdefault(without(key, (component,)), []).append((key[component], tensor))
    return [
        (rest, concatenate([tensor for _, tensor in sorted(pieces, key=lambda each: each[0])], dim))
        for rest, pieces in groups.items()
    ]
