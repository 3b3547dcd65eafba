"""Every rule on random relations: before and after agree; where its condition fails it does nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.errors import UsageError
from capstan.relations import (
    Aggregation,
    ArrayMap,
    EinsumKernel,
    Filter,
    Join,
    KeyFunction,
    KeyPredicate,
    ReKey,
    Source,
    TensorRelation,
    Transform,
    einsum_plan,
    evaluate,
)
from capstan.relations.local_operators import LocalAggregate, LocalFilter, LocalJoin, LocalMap
from capstan.relations.logical_rules import LOGICAL_RULES, simplify
from capstan.relations.optimiser import by_all_keys, compile_default, is_balanced, optimise
from capstan.relations.physical import Broadcast, Everywhere, PartitionedBy, Placed, Shuffle
from capstan.relations.physical_rules import PHYSICAL_RULES, neighbours
from capstan.relations.site_engine import run_on_sites

from .arbitrary import einsums

DOUBLE = ArrayMap(name="double", function=lambda x: 2 * x, distributes_over=frozenset({"sum", "max", "min"}))
SQUARE = ArrayMap(name="square", function=lambda x: x * x)
EVEN = KeyPredicate(name="even", reads=(0,), function=lambda at: at % 2 == 0)
LAST = KeyPredicate(name="last", reads=(1,), function=lambda at: at > 0)


def relation(seed, keys=(3, 3), missing=True):
    """A relation of 2 × 2 tensors with a few keys missing."""
    rng = np.random.default_rng(seed)
    grid = [key for key in np.ndindex(*keys) if not missing or rng.random() < 0.8] or [(0, 0)]
    return TensorRelation.from_items(
        (tuple(map(int, key)), rng.integers(-3, 4, (2, 2)).astype(np.float64)) for key in grid
    )


def same(left, right):
    return left.type == right.type and all(
        np.array_equal(tensor, right.tiles[key]) for key, tensor in left.tiles.items()
    )


def product(seed, left_keys=(1,), right_keys=(0,)):
    return Join(
        left=Source(name="X", relation=relation(seed)),
        right=Source(name="Y", relation=relation(seed + 1)),
        left_keys=left_keys,
        right_keys=right_keys,
        kernel=EinsumKernel(subscripts="ij,jk->ik"),
    )


def source(seed):
    return Source(name="X", relation=relation(seed))


THIRD = KeyPredicate(name="third", reads=(2,), function=lambda at: at != 1)
SHARED = KeyPredicate(name="shared", reads=(1, 2), function=lambda j, k: j <= k)

APPLIES = {
    "merge-filters": [lambda s: Filter(input=Filter(input=source(s), predicate=LAST), predicate=EVEN)],
    "compose-maps": [lambda s: Transform(input=Transform(input=source(s), map=SQUARE), map=DOUBLE)],
    "filter-before-map": [lambda s: Filter(input=Transform(input=source(s), map=SQUARE), predicate=EVEN)],
    "fuse-map-into-join": [lambda s: Transform(input=product(s), map=SQUARE)],
    "map-before-sum": [
        lambda s, fold=fold: Transform(
            input=Aggregation(input=source(s), group_by=(1,), fold=fold), map=DOUBLE
        )
        for fold in ("sum", "max", "min")
    ],
    "map-after-sum": [
        lambda s: Aggregation(input=Transform(input=source(s), map=DOUBLE), group_by=(0,), fold="sum")
    ],
    "filter-before-sum": [
        lambda s: Filter(input=Aggregation(input=source(s), group_by=(1,), fold="sum"), predicate=EVEN),
        lambda s: Filter(input=Aggregation(input=source(s), group_by=(1, 0), fold="max"), predicate=LAST),
    ],
    "filter-before-join": [
        lambda s: Filter(input=product(s), predicate=EVEN),
        lambda s: Filter(input=product(s), predicate=THIRD),
        lambda s: Filter(input=product(s), predicate=SHARED),
    ],
}
REFUSES = {
    "map-before-sum": Transform(input=Aggregation(input=source(0), group_by=(1,), fold="sum"), map=SQUARE),
    "map-after-sum": Aggregation(input=Transform(input=source(0), map=SQUARE), group_by=(0,), fold="sum"),
    "filter-before-join": Filter(
        input=product(0), predicate=KeyPredicate(name="both", reads=(0, 2), function=lambda i, k: i == k)
    ),
    "filter-before-map": Filter(
        input=ReKey(input=source(0), function=KeyFunction(name="swap", function=lambda key: key[::-1])),
        predicate=EVEN,
    ),
}


@pytest.mark.parametrize("name", LOGICAL_RULES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_logical_rule_keeps_the_relation(name, seed):
    for build in APPLIES[name]:
        before = build(seed)
        after = LOGICAL_RULES[name](before)
        assert after is not None
        assert after.type == before.type
        assert same(evaluate(before), evaluate(after))


@pytest.mark.parametrize("name", REFUSES)
def test_a_rule_whose_condition_fails_is_not_applied(name):
    assert LOGICAL_RULES[name](REFUSES[name]) is None


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_simplifying_keeps_the_relation_and_leaves_nothing_to_simplify(seed):
    plan = Filter(
        input=Filter(
            input=Transform(
                input=Aggregation(
                    input=Transform(input=product(seed), map=DOUBLE), group_by=(0, 2), fold="sum"
                ),
                map=SQUARE,
            ),
            predicate=EVEN,
        ),
        predicate=LAST,
    )
    simple, used = simplify(plan)
    assert {"filter-before-map", "filter-before-sum", "filter-before-join"} <= set(used)
    assert same(evaluate(plan), evaluate(simple))
    assert simplify(simple)[1] == ()


def placed(seed, at, sites=3):
    return Placed(name="X", relation=relation(seed), at=at, sites=sites)


def sum_of(node, by=(0,), **more):
    return LocalAggregate(input=node, group_by=by, fold="sum", **more)


def joined(left, right):
    return LocalJoin(
        left=left, right=right, left_keys=(1,), right_keys=(0,), kernel=EinsumKernel(subscripts="ij,jk->ik")
    )


ROWS, COLUMNS = PartitionedBy((0,)), PartitionedBy((1,))
PHYSICAL = {
    "last-move-counts": lambda s: Shuffle(input=Broadcast(input=placed(s, ROWS)), by=(1,)),
    "needless-move": lambda s: Shuffle(input=placed(s, ROWS), by=(0,)),
    "filter-before-move": lambda s: LocalFilter(
        input=Shuffle(input=placed(s, ROWS), by=(1,)), predicate=EVEN
    ),
    "sum-in-place": lambda s: sum_of(Shuffle(input=placed(s, ROWS), by=(0, 1)), (0, 1)),
    "two-phase-sum": lambda s: sum_of(Shuffle(input=placed(s, COLUMNS), by=(0,))),
    "join-strategies": lambda s: joined(Broadcast(input=placed(s, ROWS)), placed(s + 1, COLUMNS)),
    "shuffle-by-less": lambda s: sum_of(Shuffle(input=placed(s, COLUMNS), by=(0, 1)), (0, 1)),
}


@pytest.mark.parametrize("name", PHYSICAL_RULES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_physical_rule_keeps_the_relation_and_every_byte_is_predicted(name, seed):
    before = PHYSICAL[name](seed)
    wanted, sent = run_on_sites(before)
    assert sum(sent.size_bytes.values()) == before.total_bytes
    after = list(PHYSICAL_RULES[name](before))
    assert after
    for plan in after:
        found, sent = run_on_sites(plan)
        assert same(found, wanted)
        assert sum(sent.size_bytes.values()) == plan.total_bytes


def test_physical_rules_whose_conditions_fail_are_not_applied():
    everywhere = sum_of(Shuffle(input=placed(0, Everywhere()), by=(0,)))
    assert list(PHYSICAL_RULES["two-phase-sum"](everywhere)) == []
    spread = sum_of(Shuffle(input=placed(0, COLUMNS), by=(0,)))
    assert list(PHYSICAL_RULES["sum-in-place"](spread)) == []
    swap = KeyFunction(name="swap", function=lambda key: key[::-1])
    rekeyed = LocalMap(input=Shuffle(input=placed(0, ROWS), by=(1,)), rekey=swap)
    assert list(PHYSICAL_RULES["filter-before-move"](rekeyed)) == []


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: sum_of(placed(0, COLUMNS)), "needs each group on one site"),
        (lambda: sum_of(placed(0, Everywhere()), is_partial=True), "count them once a site"),
        (
            lambda: joined(placed(0, ROWS), placed(1, COLUMNS)),
            "one side everywhere or both by their join keys",
        ),
        (lambda: Broadcast(input=sum_of(placed(0, COLUMNS), is_partial=True)), "cannot be broadcast"),
        (lambda: joined(placed(0, COLUMNS, 2), placed(1, ROWS, 3)), "2 sites cannot join with 3"),
        (lambda: placed(0, PartitionedBy((5,))), "below 2"),
        (
            lambda: LocalMap(input=sum_of(placed(0, COLUMNS), is_partial=True), map=SQUARE),
            "maps the parts",
        ),
        (lambda: optimise(product(0), num_sites=0), "at least one"),
    ],
)
def test_a_plan_that_would_be_wrong_cannot_be_built(build, says):
    with pytest.raises(UsageError, match=says):
        build()


def test_a_shuffle_of_what_lies_everywhere_sends_nothing():
    assert Shuffle(input=placed(0, Everywhere()), by=(0,)).total_bytes == 0


@settings(max_examples=40, deadline=None)
@given(case=einsums(most_operands=3), sites=st.sampled_from([1, 2, 3, 4]), data=st.data())
def test_optimised_plans_compute_numpys_einsum_and_send_exactly_the_predicted_bytes(case, sites, data):
    operands = [
        TensorRelation.from_array(array, tile=tile)
        for array, tile in zip(case.arrays, case.operand_tiles, strict=True)
    ]
    plan = optimise(einsum_plan(case.text, *operands), num_sites=sites)
    for physical in (plan.physical, plan.default):
        found, sent = run_on_sites(physical)
        assert np.array_equal(found.to_array(), np.einsum(case.text, *case.arrays))
        assert sum(sent.size_bytes.values()) == physical.total_bytes


def shape_of(node):
    """A plan as a tree of words, to tell plans apart."""
    return (node.label, str(node.placement), *(shape_of(each) for each in node.inputs))


def everything_that_rules_reach(start):
    """All plans that the rules make of `start`; small plans only."""
    seen, waiting = {shape_of(start): start}, [start]
    while waiting:
        for _, other in neighbours(waiting.pop()):
            name = shape_of(other)
            if name not in seen:
                seen[name] = other
                waiting.append(other)
    return list(seen.values())


def all_balanced(plan):
    return is_balanced(plan) and all(map(all_balanced, plan.inputs))


@pytest.mark.parametrize("sites", [2, 3])
@pytest.mark.parametrize("rows", [(2, 4, 2), (4, 1, 4), (1, 6, 1), (3, 3, 3)])
@pytest.mark.parametrize("start", ["rows", "keys"])
def test_no_plan_that_the_rules_reach_sends_less(sites, rows, start):
    i, j, k = rows
    left = TensorRelation.from_array(np.ones((2 * i, 2 * j)), tile=(2, 2))
    right = TensorRelation.from_array(np.ones((2 * j, 2 * k)), tile=(2, 2))
    where = by_all_keys if start == "keys" else (lambda source: PartitionedBy((0,)))
    logical = einsum_plan("ij,jk->ik", left, right)
    chosen = optimise(logical, num_sites=sites, where=where)
    reached = everything_that_rules_reach(compile_default(chosen.logical, num_sites=sites, where=where))
    assert len(reached) > 5
    wanted, _ = run_on_sites(chosen.physical)
    for plan in reached:
        assert same(run_on_sites(plan)[0], wanted)
    least = min((plan.total_bytes for plan in reached if all_balanced(plan)), default=None)
    if least is not None:
        assert chosen.physical.total_bytes <= least


def test_a_product_over_a_long_inner_label_is_shuffled_and_summed_in_two_phases():
    left = TensorRelation.from_array(np.ones((2, 64)), tile=(2, 2))
    right = TensorRelation.from_array(np.ones((64, 2)), tile=(2, 2))
    plan = optimise(
        einsum_plan("ij,jk->ik", left, right), num_sites=4, where=lambda source: PartitionedBy((0,))
    )
    text = str(plan)
    assert "partial" in text  # CPMM: sums on each site first
    assert plan.physical.total_bytes < plan.default.total_bytes
    assert "the default would send" in text


def test_a_small_side_is_broadcast_to_a_large_one():
    left = TensorRelation.from_array(np.ones((2, 2)), tile=(2, 2))
    right = TensorRelation.from_array(np.ones((2, 64)), tile=(2, 2))
    plan = optimise(
        einsum_plan("ij,jk->ik", left, right),
        num_sites=4,
        where=lambda source: PartitionedBy((source.type.key_arity - 1,)),
    )
    assert "Broadcast" in str(plan.physical)
    assert plan.physical.total_bytes == 3 * 2 * 2 * 8  # the small matrix to the three other sites, no more
