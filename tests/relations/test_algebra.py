"""Logical operators against dense arrays; what is wrong is refused when the plan is built."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.errors import InputError, UsageError
from capstan.relations import (
    SEMIRINGS,
    Aggregation,
    ArrayMap,
    Concat,
    EinsumKernel,
    ElementwiseKernel,
    Filter,
    Join,
    KeyFunction,
    KeyPredicate,
    ReKey,
    Source,
    TensorRelation,
    Tile,
    Transform,
    einsum_plan,
    evaluate,
)

from .arbitrary import dense_semiring, einsums

RELU = ArrayMap(name="relu", function=lambda array: np.maximum(array, 0))


def relation(rows=4, columns=6, tile=(2, 3)):
    return TensorRelation.from_array(
        np.arange(rows * columns, dtype=np.float64).reshape(rows, columns), tile=tile
    )


def source(**sizes):
    return Source(name="X", relation=relation(**sizes))


@settings(max_examples=150, deadline=None)
@given(case=einsums(), as_torch=st.booleans())
def test_a_plan_over_any_tiling_equals_numpys_einsum(case, as_torch):
    arrays = [torch.from_numpy(array.copy()) for array in case.arrays] if as_torch else case.arrays
    operands = [
        TensorRelation.from_array(array, tile=tile)
        for array, tile in zip(arrays, case.operand_tiles, strict=True)
    ]
    found = evaluate(einsum_plan(case.text, *operands)).to_array()
    assert np.array_equal(np.asarray(found), np.einsum(case.text, *case.arrays))


@settings(max_examples=80, deadline=None)
@given(case=einsums(most_operands=3), name=st.sampled_from(sorted(set(SEMIRINGS) - {"sum-product"})))
def test_other_semirings_follow_their_definition(case, name):
    add, multiply = {
        "max-plus": (np.maximum, np.add),
        "min-plus": (np.minimum, np.add),
        "or-and": (np.logical_or, np.logical_and),
    }[name]
    arrays = [array > 0 for array in case.arrays] if name == "or-and" else case.arrays
    operands = [
        TensorRelation.from_array(array, tile=tile)
        for array, tile in zip(arrays, case.operand_tiles, strict=True)
    ]
    found = evaluate(einsum_plan(case.text, *operands, semiring=SEMIRINGS[name])).to_array()
    assert np.array_equal(found, dense_semiring(case.text, arrays, add, multiply))


def test_the_type_that_was_promised_is_the_type_that_comes():
    x, y = source(), Source(name="Y", relation=relation(6, 4, (3, 2)))
    plan = Aggregation(
        input=Join(
            left=x, right=y, left_keys=(1,), right_keys=(0,), kernel=EinsumKernel(subscripts="ij,jk->ik")
        ),
        group_by=(0, 2),
        fold="sum",
    )
    assert evaluate(plan).type == plan.type


def test_a_plan_prints_its_operators_and_their_types():
    x = source()
    plan = Aggregation(input=Transform(input=x, map=RELU), group_by=(0,), fold="sum")
    assert str(plan).splitlines() == [
        "Σ sum by [0]  [keys 2; tiles 2 × 3 float64]",
        "  λ relu  [keys 2 × 2; tiles 2 × 3 float64]",
        "    X  [keys 2 × 2; tiles 2 × 3 float64]",
    ]


@settings(max_examples=40, deadline=None)
@given(dim=st.integers(0, 1), rows=st.integers(1, 4), columns=st.integers(1, 4), pieces=st.integers(1, 3))
def test_concat_undoes_tile(dim, rows, columns, pieces):
    tile = (pieces * 2, pieces * 2)
    x = source(rows=rows * tile[0], columns=columns * tile[1], tile=tile)
    back = Concat(input=Tile(input=x, dim=dim, size=2), key_component=2, dim=dim)
    found, wanted = evaluate(back), x.relation
    assert found.type == wanted.type == back.type
    assert all(np.array_equal(found.tiles[key], wanted.tiles[key]) for key in wanted.tiles)


def test_missing_tiles_count_as_zeros_of_a_sum_and_as_nothing_of_a_maximum():
    whole = relation()
    holed = TensorRelation.from_items((key, tile) for key, tile in whole.tiles.items() if key != (0, 1))
    x = holed.to_array(fill=0)
    other = np.ones((6, 2))
    y = TensorRelation.from_array(other, tile=(3, 2))
    assert np.array_equal(evaluate(einsum_plan("ij,jk->ik", holed, y)).to_array(), x @ other)
    found = evaluate(einsum_plan("ij,jk->ik", holed, y, semiring=SEMIRINGS["max-plus"])).to_array()
    absent = holed.to_array(fill=-np.inf)
    assert np.array_equal(found, (absent[:, :, None] + other[None]).max(1))


def test_filter_rekey_and_elementwise_join():
    x = source()
    first = Filter(
        input=x, predicate=KeyPredicate(name="first row", reads=(0,), function=lambda row: row == 0)
    )
    moved = ReKey(input=first, function=KeyFunction(name="swap", function=lambda key: key[::-1]))
    doubled = Join(
        left=moved, right=moved, left_keys=(0, 1), right_keys=(0, 1), kernel=ElementwiseKernel(fold="sum")
    )
    found = evaluate(doubled)
    assert sorted(found.tiles) == [(0, 0), (1, 0)]
    assert np.array_equal(found.tiles[1, 0], 2 * x.relation.tiles[0, 1])


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: Aggregation(input=source(), group_by=(2,), fold="sum"), UsageError, "below 2"),
        (lambda: Aggregation(input=source(), group_by=(0, 0), fold="sum"), UsageError, "different"),
        (lambda: Aggregation(input=source(), group_by=(0,), fold="summ"), UsageError, "Did you mean 'sum'"),
        (lambda: Aggregation(input=source(), group_by=(0,), fold="or"), InputError, "float64"),
        (lambda: Tile(input=source(), dim=1, size=2), UsageError, "do not divide"),
        (lambda: Tile(input=source(), dim=2, size=1), UsageError, "no dimension 2"),
        (
            lambda: ReKey(input=source(), function=KeyFunction(name="row", function=lambda key: key[:1])),
            InputError,
            "injective",
        ),
        (
            lambda: Join(
                left=source(),
                right=source(),
                left_keys=(1,),
                right_keys=(0,),
                kernel=EinsumKernel(subscripts="ij,jk->ik"),
            ),
            InputError,
            "label 'j' has size 3",
        ),
        (
            lambda: Join(
                left=source(),
                right=source(),
                left_keys=(1,),
                right_keys=(),
                kernel=ElementwiseKernel(fold="sum"),
            ),
            UsageError,
            "one length",
        ),
        (
            lambda: Concat(
                input=Filter(
                    input=source(),
                    predicate=KeyPredicate(name="p", reads=(0, 1), function=lambda i, j: i + j < 2),
                ),
                key_component=0,
                dim=0,
            ),
            InputError,
            "a tile is missing",
        ),
        (lambda: TensorRelation.from_items([((0,), [1.0]), ((0,), [2.0])]), InputError, "comes twice"),
        (lambda: TensorRelation.from_items([((0,), [1.0]), ((1,), [2.0, 3.0])]), InputError, "one shape"),
        (lambda: TensorRelation.from_items([((0,), [1.0]), ((1,), [2])]), InputError, "one type"),
        (lambda: TensorRelation.from_items([((0,), [1.0]), ((1, 0), [2.0])]), InputError, "differ in length"),
        (lambda: TensorRelation.from_items([((-1,), [1.0])]), InputError, "is no key"),
        (lambda: TensorRelation.from_items([((0,), ["a"])]), InputError, "numbers or booleans"),
        (lambda: TensorRelation.from_items([]), InputError, "like="),
        (lambda: relation(tile=(3, 3)), InputError, "do not divide"),
        (lambda: relation(tile=(2,)), InputError, "has 1 sizes"),
        (
            lambda: einsum_plan("ij,jk->iq", relation(), relation(6, 4, (3, 2))),
            UsageError,
            "'q' occurs in no operand",
        ),
        (lambda: einsum_plan("ij,jk->ik", relation()), UsageError, "names 2 operands"),
        (lambda: einsum_plan("ij,jk", relation(), relation()), InputError, "size 6"),
        (lambda: einsum_plan("ij,ij", relation(), relation(tile=(2, 2))), InputError, "Cut it alike"),
        (
            lambda: einsum_plan("ij->i", relation(), semiring=SEMIRINGS["or-and"]),
            InputError,
            "needs booleans",
        ),
        (
            lambda: TensorRelation.from_items([((0, 0), [[1.0]]), ((1, 1), [[1.0]])]).to_array(),
            InputError,
            "tile (0, 1) is missing",
        ),
    ],
)
def test_what_is_wrong_is_refused_when_it_is_built(build, error, says):
    with pytest.raises(error) as caught:
        build()
    assert says in str(caught.value)
