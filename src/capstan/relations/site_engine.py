"""Runs a physical plan with one process standing for all sites, and counts the bytes that change site."""

from collections.abc import Sequence

from capstan.errors import InputError
from capstan.plans import Traffic, link_name
from capstan.relations.arrays import size_bytes
from capstan.relations.local_operators import (
    LocalAggregate,
    LocalConcat,
    LocalFilter,
    LocalJoin,
    LocalMap,
    LocalTile,
)
from capstan.relations.physical import Broadcast, Everywhere, Partial, Physical, Placed, Shuffle
from capstan.relations.reference import Item, aggregate, cut, glue, join
from capstan.relations.tensor_relation import TensorRelation

Sites = list[list[Item]]


def run_on_sites(plan: Physical) -> tuple[TensorRelation, Traffic]:
    """The relation that a plan computes, and what every link carried.

    Raises:
        InputError: the plan ends in partial results, which are no relation.
    """
    if isinstance(plan.placement, Partial):
        raise InputError("The plan ends in partial results; shuffle and aggregate them first.")
    done: dict[int, Sites] = {}
    sent: dict[tuple[str, str], int] = {}

    def sites(node: Physical) -> Sites:
        if id(node) not in done:
            done[id(node)] = _apply(node, [sites(each) for each in node.inputs], sent)
        return done[id(node)]

    found: dict[tuple[int, ...], Item] = {}
    for items in sites(plan):
        for key, tensor in items:
            found.setdefault(key, (key, tensor))
    return TensorRelation.from_items(found.values(), like=plan.type), Traffic(sent)


def _apply(node: Physical, inputs: Sequence[Sites], sent: dict[tuple[str, str], int]) -> Sites:
    match node:
        case Placed():
            return [[(key, node.relation.tiles[key]) for key in keys] for keys in node.held]
        case Broadcast():
            return _broadcast(inputs[0], sent)
        case Shuffle():
            return _shuffle(node, inputs[0], sent)
        case LocalJoin():
            keys = node.left_keys, node.right_keys
            return [join(a, b, *keys, node.kernel) for a, b in zip(*inputs, strict=True)]
        case LocalAggregate():
            return [aggregate(items, node.group_by, node.fold) for items in inputs[0]]
        case LocalFilter():
            return [[item for item in items if node.predicate(item[0])] for items in inputs[0]]
        case LocalMap():
            return [[_mapped(node, item) for item in items] for items in inputs[0]]
        case LocalTile():
            return [cut(items, node.dim, node.size) for items in inputs[0]]
        case LocalConcat():
            return [glue(items, node.key_component, node.dim) for items in inputs[0]]
    raise AssertionError(f"no such operator: {node.label}")


def _mapped(node: LocalMap, item: Item) -> Item:
    key, tensor = item
    return (
        key if node.rekey is None else node.rekey(key),
        tensor if node.map is None else node.map(tensor),
    )


def _count(sent: dict[tuple[str, str], int], source: int, target: int, item: Item, content: str) -> None:
    link = (link_name(f"site {source}", f"site {target}"), content)
    sent[link] = sent.get(link, 0) + size_bytes(item[1])


def _broadcast(sites: Sites, sent: dict[tuple[str, str], int]) -> Sites:
    result: Sites = [list(items) for items in sites]
    held = [{key for key, _ in items} for items in sites]
    known: set[tuple[int, ...]] = set()
    for source, items in enumerate(sites):
        for item in items:
            if item[0] in known:
                continue
            known.add(item[0])
            for target, keys in enumerate(held):
                if item[0] not in keys:
                    result[target].append(item)
                    _count(sent, source, target, item, "broadcast")
    return result


def _shuffle(node: Shuffle, sites: Sites, sent: dict[tuple[str, str], int]) -> Sites:
    is_everywhere = node.input.placement == Everywhere()
    result: Sites = [[] for _ in sites]
    for source, items in enumerate(sites):
        for item in items:
            target = node.target(item[0])
            if target == source:
                result[target].append(item)
            elif not is_everywhere:
                result[target].append(item)
                _count(sent, source, target, item, "shuffle")
    return result
