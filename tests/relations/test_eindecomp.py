"""EinDecomp: the cost formulas by hand, the partitions that published cases call for, and the optimum by
exhaustive search."""

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan import relations
from capstan.errors import InputError, UsageError
from capstan.relations.eindecomp import OperationPartition, decompose
from capstan.relations.partition_costs import aggregation_cost, join_cost, partitions, repartition_cost
from capstan.relations.program import lower
from capstan.relations.site_traffic import predicted_traffic, run_on_devices

from .arbitrary import einsums


def shaped(*shape):
    """An array of any size that takes the memory of one element."""
    return np.broadcast_to(np.float32(0), shape)


def product_of(i, j, k):
    return lower(relations.einsum("ij,jk->ik", shaped(i, j), shaped(j, k)))


def join_and_aggregation(shape, parts):
    sizes = dict(zip("ijk", shape, strict=True))
    cut = dict(zip("ijk", parts, strict=True))
    return join_cost(sizes, ("ij", "jk"), cut) + aggregation_cost(sizes, "ik", cut)


SQUARE, LARGE_J, LARGE_IK = (40_000,) * 3, (10_000, 640_000, 10_000), (80_000, 10_000, 80_000)


@pytest.mark.parametrize(
    ("shape", "devices", "best", "cost", "rows_only", "contracted_only"),
    [
        (SQUARE, 8, {(2, 2, 2)}, 8.0, 14.4, 14.4),
        (SQUARE, 16, {(2, 2, 4), (2, 4, 2), (4, 2, 2)}, 11.2, 27.2, 27.2),
        (LARGE_J, 8, {(1, 8, 1)}, 13.5, 57.6, 13.5),
        (LARGE_J, 16, {(1, 16, 1)}, 14.3, 108.8, 14.3),
        (LARGE_IK, 8, {(2, 1, 4), (4, 1, 2)}, 4.8, 7.2, 46.4),
        (LARGE_IK, 16, {(4, 1, 4)}, 6.4, 13.6, 97.6),
    ],
)
def test_each_shape_calls_for_its_own_algorithm(shape, devices, best, cost, rows_only, contracted_only):
    found = {parts: join_and_aggregation(shape, parts) for parts in partitions(shape, devices)}
    least = min(found.values())
    assert {parts for parts, price in found.items() if price == least} == best
    assert least == cost * 10**9
    assert found[devices, 1, 1] == rows_only * 10**9
    assert found[1, devices, 1] == contracted_only * 10**9


@pytest.mark.parametrize(
    ("shape", "devices", "cost", "joins"),
    [
        (SQUARE, 8, 17.6, {(2, 2, 2)}),  # three-dimensional
        (SQUARE, 16, 24.0, {(2, 2, 4), (2, 4, 2), (4, 2, 2)}),
        (LARGE_J, 8, 14.3, {(1, 8, 1)}),  # on the contracted label, CPMM
        (LARGE_J, 16, 15.9, {(1, 16, 1)}),
        (LARGE_IK, 8, 9.6, {(2, 1, 4), (4, 1, 2)}),  # two-dimensional
        (LARGE_IK, 16, 12.8, {(4, 1, 4)}),
    ],
)
def test_the_planner_picks_3d_cpmm_and_2d_with_repartitions_counted(shape, devices, cost, joins):
    plan = decompose(product_of(*shape), devices)
    (only,) = plan.operations
    parts = only.parts
    assert (parts["i"], parts["j"], parts["k"]) in joins
    assert plan.cost == plan.recomputed_cost() == round(cost * 10**9)
    assert plan.is_optimal


@pytest.mark.parametrize(
    ("before", "after", "cost"),
    [
        ((8, 1), (8, 1), 0),
        ((4, 1), (8, 1), 128),
        ((8, 1), (4, 1), 128),
        ((2, 1), (1, 2), 192),
        ((2, 4), (4, 2), 192),
        ((8, 1), (1, 8), 960),
    ],
)
def test_repartitions_of_an_8_by_8_tensor(before, after, cost):
    assert repartition_cost(64, before, after) == cost


@pytest.mark.parametrize(
    ("sizes", "costs"),
    [
        ((64, 64, 64, 64), (40_960, 65_536, 90_112)),
        ((256, 16, 16, 256), (25_600, 38_912, 57_344)),
        ((16, 1024, 16, 64), (35_584, 37_632, 41_728)),
        ((1024, 16, 1024, 16), (1_196_032, 1_294_336, 1_425_408)),
    ],
)
def test_chains_of_two_products(sizes, costs):
    a, b, c, d = sizes
    first = relations.einsum("ij,jk->ik", shaped(a, b), shaped(b, c))
    chain = lower(relations.einsum("ik,kl->il", first, shaped(c, d)))
    plans = [decompose(chain, devices) for devices in (2, 4, 8)]
    assert tuple(plan.cost for plan in plans) == costs
    assert tuple(plan.recomputed_cost() for plan in plans) == costs


def exhaustive(program, devices):
    """The least cost over every combination of join, input and output partitions, by the formulas."""
    options = []
    for operation in program.operations:
        labels = operation.output + operation.folded
        joins = partitions(tuple(operation.sizes[label] for label in labels), devices)
        outputs = partitions(tuple(operation.sizes[label] for label in operation.output), devices)
        options.append(list(product(joins, outputs)))
    least = None
    for choice in product(*options):
        left = {
            operation.result: output
            for operation, (_, output) in zip(program.operations, choice, strict=True)
        }
        total = 0
        for operation, (join, output) in zip(program.operations, choice, strict=True):
            own = OperationPartition(
                operation=operation,
                join=join,
                inputs=tuple(left.get(number, ()) for number in operation.inputs),
                output=output,
            )
            inputs = []
            for at, number in enumerate(operation.inputs):
                shape = tuple(operation.sizes[label] for label in operation.labels[at])
                free = partitions(shape, devices)
                nearest = min(
                    free, key=lambda each, at=at: repartition_cost(prod(shape), each, own.required(at))
                )
                inputs.append(left.get(number, nearest))
            total += sum(
                OperationPartition(operation=operation, join=join, inputs=tuple(inputs), output=output)
                .costs()
                .values()
            )
        least = total if least is None else min(least, total)
    return least


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 2, 3, 4, 16, 64]), min_size=4, max_size=4),
    devices=st.sampled_from([1, 2, 4]),
)
def test_no_plan_of_a_tree_is_cheaper(sizes, devices):
    a, b, c, d = sizes
    first = relations.apply("relu", relations.einsum("ij,jk->ik", shaped(a, b), shaped(b, c)))
    program = lower(relations.einsum("ik,kl->l", first, shaped(c, d)))
    plan = decompose(program, devices)
    assert plan.is_optimal
    assert plan.cost == plan.recomputed_cost() == exhaustive(program, devices)


@settings(max_examples=60, deadline=None)
@given(case=einsums(most_operands=4, repeats=False), devices=st.sampled_from([1, 2, 4, 8]))
def test_devices_compute_numpys_einsum_and_send_exactly_the_predicted_bytes(case, devices):
    plan = decompose(lower(relations.einsum(case.text, *case.arrays)), devices)
    found, sent = run_on_devices(plan)
    assert np.array_equal(found, np.einsum(case.text, *case.arrays))
    assert sent == sum(
        (predicted_traffic(each) for each in plan.operations[1:]), predicted_traffic(plan.operations[0])
    )
    assert plan.cost == plan.recomputed_cost()


def test_a_result_that_is_read_twice_is_decided_once_and_no_optimum_is_claimed():
    x = np.arange(64.0).reshape(8, 8)
    shared = relations.einsum("ij,jk->ik", x, x)
    plan = decompose(lower(relations.einsum("ij,jk->ik", shared, shared)), 4)
    found, _ = run_on_devices(plan)
    assert not plan.is_optimal
    assert plan.cost == plan.recomputed_cost()
    assert np.array_equal(found, x @ x @ x @ x)


def test_one_device_sends_nothing():
    plan = decompose(product_of(64, 64, 64), 1)
    assert predicted_traffic(plan.operations[0]).links == ()


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(UsageError, match="6 devices.*use 4"):
        decompose(product_of(8, 8, 8), 6)
    with pytest.raises(InputError, match="repeats a label"):
        decompose(lower(relations.einsum("ii->i", np.eye(3))), 2)
