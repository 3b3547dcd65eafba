"""Expressions in memory: any einsum, semirings, element-wise maps, and derivatives against autograd."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan import relations
from capstan.errors import InputError, UsageError

from .arbitrary import dense_semiring, einsums


@settings(max_examples=150, deadline=None)
@given(case=einsums(), as_torch=st.booleans())
def test_any_einsum_equals_numpys(case, as_torch):
    arrays = [torch.from_numpy(array.copy()) for array in case.arrays] if as_torch else case.arrays
    found = relations.einsum(case.text, *arrays).compute()
    assert isinstance(found, torch.Tensor if as_torch else np.ndarray)
    assert np.array_equal(np.asarray(found), np.einsum(case.text, *case.arrays))


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("...ij,...jk->...ik", [(2, 3, 4, 5), (3, 5, 6)]),
        ("...ij,...jk->...ik", [(2, 1, 4, 5), (3, 5, 6)]),
        ("...,...->...", [(3, 1), (1, 4)]),
        ("...i->...", [(2, 3)]),
        ("ij,jk", [(2, 3), (3, 4)]),
        ("ba", [(2, 3)]),
        (" i j , j k -> i k ", [(2, 3), (3, 4)]),
        ("...i,j...", [(2, 3, 4), (5, 2, 1)]),
    ],
)
def test_ellipsis_and_implicit_output_follow_numpy(text, shapes):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-3, 4, shape).astype(np.float64) for shape in shapes]
    assert np.array_equal(relations.einsum(text, *arrays).compute(), np.einsum(text, *arrays))


@settings(max_examples=60, deadline=None)
@given(case=einsums(most_operands=4), name=st.sampled_from(["max-plus", "min-plus", "or-and"]))
def test_semirings_of_many_operands(case, name):
    add, multiply = {
        "max-plus": (np.maximum, np.add),
        "min-plus": (np.minimum, np.add),
        "or-and": (np.logical_or, np.logical_and),
    }[name]
    arrays = [array > 0 for array in case.arrays] if name == "or-and" else case.arrays
    found = relations.einsum(case.text, *arrays, semiring=name).compute()
    assert np.array_equal(found, dense_semiring(case.text, arrays, add, multiply))


def test_min_plus_gives_shortest_paths_of_two_steps():
    steps = np.array([[0, 3, np.inf], [3, 0, 1], [np.inf, 1, 0]])
    assert relations.einsum("ij,jk->ik", steps, steps, semiring="min-plus").compute()[0, 2] == 4


@settings(max_examples=80, deadline=None)
@given(case=einsums(most_operands=4), seed=st.integers(0, 99))
def test_the_derivative_of_an_einsum_is_autograds(case, seed):
    leaves = [relations.tensor(array) for array in case.arrays]
    output = relations.einsum(case.text, *leaves)
    rng = np.random.default_rng(seed)
    upstream = rng.integers(-3, 4, output.shape).astype(np.float64)
    found = relations.gradient(output, leaves, upstream=relations.tensor(upstream))
    tensors = [torch.from_numpy(array.copy()).requires_grad_() for array in case.arrays]
    torch.einsum(case.text, *tensors).backward(torch.from_numpy(upstream))
    for derivative, tensor in zip(found, tensors, strict=True):
        wanted = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad.numpy()
        assert np.array_equal(derivative.compute(), wanted)  # integers: exact in any order


@pytest.mark.parametrize("name", ["relu", "exp", "tanh", "sigmoid", "negative", "square"])
def test_maps_and_their_derivatives_follow_torch(name):
    x = torch.linspace(-2, 2, 7, dtype=torch.float64).reshape(7, 1).requires_grad_()
    wanted = {"negative": torch.neg}.get(name, getattr(torch, name, None))(x)
    wanted.sum().backward()
    leaf = relations.tensor(x.detach().numpy())
    output = relations.apply(name, leaf)
    (slope,) = relations.gradient(output, [leaf])
    # A few operations of float64 near 1: each rounds by at most 1.2e-16 of values below 8.
    assert np.allclose(output.compute(), wanted.detach().numpy(), rtol=0, atol=1e-14)
    assert np.allclose(slope.compute(), x.grad.numpy(), rtol=0, atol=1e-14)


def test_a_training_step_of_two_layers_is_autograds():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, size, generator=generator, dtype=torch.float64) for size in (4, 3))
    w1, w2 = (
        torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in ((4, 6), (6, 3))
    )
    ((torch.sigmoid(torch.relu(x @ w1) @ w2) - y) ** 2).sum().backward()
    first, second = (relations.tensor(w.detach()) for w in (w1, w2))
    hidden = relations.apply("relu", relations.einsum("bi,ih->bh", x, first))
    output = relations.apply("sigmoid", relations.einsum("bh,ho->bo", hidden, second))
    loss = relations.einsum("bo->", relations.apply("square", output - relations.tensor(y)))
    slopes = relations.gradient(loss, [first, second])
    for slope, weight in zip(slopes, (w1, w2), strict=True):
        # Sums of at most 30 products below 100 in float64.
        assert torch.allclose(slope.compute(), weight.grad, rtol=0, atol=1e-11)


def test_an_expression_prints_as_numbered_steps():
    x = relations.tensor(np.ones((2, 3)), name="x")
    assert str(relations.apply("relu", relations.einsum("ij,kj->ik", x, x))).splitlines() == [
        "%0 = x  [2 × 3 float64]",
        "%1 = einsum ij,kj->ik %0 %0  [2 × 2 float64]",
        "%2 = relu %1  [2 × 2 float64]",
    ]


def test_a_result_shares_no_memory_with_its_operand():
    x = np.ones((2, 3))
    result = relations.einsum("ij->ji", x).compute()
    result[:] = 7
    assert x.sum() == 6


X = np.ones((2, 3))


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: relations.einsum("ij,jk->ik", X, X), InputError, "label 'j' has size 3, but operand 2"),
        (lambda: relations.einsum("ij->iq", X), UsageError, "'q' occurs in no operand"),
        (lambda: relations.einsum("ij->ii", X), UsageError, "names 'i' twice"),
        (lambda: relations.einsum("ijk->i", X), InputError, "has 2 dimensions (2, 3), but 'ijk' names 3"),
        (lambda: relations.einsum("i1->i", X), UsageError, "may hold letters"),
        (lambda: relations.einsum("ij->i->j", X), UsageError, "may hold letters"),
        (lambda: relations.einsum("...j->j", X), UsageError, "name what is summed"),
        (
            lambda: relations.einsum("ij,ij->", X, X.astype(np.float32)),
            InputError,
            "numpy float32 and numpy float64",
        ),
        (
            lambda: relations.einsum("ij,ij->", X, torch.ones(2, 3)),
            InputError,
            "nothing is converted silently",
        ),
        (lambda: relations.einsum("ij->", X, semiring="max-times"), UsageError, "Known:"),
        (lambda: relations.einsum("ij->", X > 0), InputError, "needs numbers"),
        (lambda: relations.einsum("ij->", X, semiring="or-and"), InputError, "needs booleans"),
        (lambda: relations.einsum("ij->", np.ones((0, 3))), InputError, "no dimension may be empty"),
        (lambda: relations.einsum("i->", ["a"]), InputError, "numbers or booleans"),
        (lambda: relations.einsum("i->", [[1, 2], [3]]), InputError, "no array"),
        (lambda: relations.einsum("->"), UsageError, "names 1 operands, but 0"),
        (lambda: relations.apply("rellu", X), UsageError, "Did you mean 'relu'"),
        (lambda: relations.apply("exp", np.ones(2, int)), InputError, "floating-point"),
        (lambda: relations.add(X, X.T), InputError, "one shape"),
        (lambda: relations.tensor(X).compute(), UsageError, "nothing to compute"),
        (
            lambda: relations.gradient(relations.apply("relu", X), [relations.tensor(X)]),
            UsageError,
            "no part",
        ),
        (lambda: relations.einsum("ij->", X).compute(memory="lots"), UsageError, "not a size"),
        (lambda: relations.einsum("ij->", X).compute(threads=0), UsageError, "at least one"),
    ],
)
def test_what_is_wrong_is_refused(build, error, says):
    with pytest.raises(error) as caught:
        build()
    assert says in str(caught.value)


def test_no_derivative_is_made_up():
    leaf = relations.tensor(X)
    with pytest.raises(InputError, match="Only sum-product"):
        relations.gradient(relations.einsum("ij->", leaf, semiring="max-plus"), [leaf])
    with pytest.raises(InputError, match="broadcasts"):
        relations.gradient(relations.einsum("...,...->...", relations.tensor(np.ones((1, 3))), leaf), [leaf])
