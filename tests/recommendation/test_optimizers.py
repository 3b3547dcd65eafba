"""A row's update is torch's, to a float32's rounding."""

import numpy as np
import pytest
import torch

from capstan.errors import UsageError
from capstan.recommendation import Adagrad, Adam, Bags, EmbeddingTable, RowWiseAdagrad, Sgd

ROWS, DIM, STEPS = 30, 19, 25


# torch warns unless it is told whether to check what its own optimizers build.
@torch.sparse.check_sparse_tensor_invariants()
def both(optimizer, reference, *, sparse, batches, pooling="sum"):
    """The rows after training in our table, and in torch's EmbeddingBag with `reference`."""
    ids = np.arange(ROWS, dtype=np.uint64)
    table = EmbeddingTable(DIM, capacity=ROWS, optimizer=optimizer, initial=(-1, 1))
    table.lookup(Bags.of(ids))
    weight = torch.from_numpy(table.rows_of(ids))
    bag = torch.nn.EmbeddingBag.from_pretrained(weight, freeze=False, mode=pooling, sparse=sparse)
    update = reference(bag.parameters())
    target = torch.linspace(-1, 1, DIM)
    for values, offsets in batches:
        pooled, lookup = table.lookup(Bags.of(values, offsets), pooling=pooling)
        out = bag(torch.from_numpy(values), torch.from_numpy(offsets[:-1]))
        update.zero_grad()
        (0.5 * (out - target).pow(2)).sum().backward()
        update.step()
        table.apply_gradients(lookup, pooled - target.numpy())
    return table.rows_of(ids), bag.weight.detach().numpy()


def batches(*, all_rows):
    generator = np.random.default_rng(0)
    for _ in range(STEPS):
        values = generator.integers(0, ROWS, 40)
        if all_rows:
            values = np.concatenate([values, generator.permutation(ROWS)])
        cuts = np.sort(generator.integers(0, len(values), 14))
        yield values, np.concatenate([[0], cuts, [len(values)]])


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize(
    ("optimizer", "reference", "sparse", "all_rows"),
    [
        (Sgd(lr=0.01), lambda p: torch.optim.SGD(p, lr=0.01), True, False),
        (
            Sgd(lr=0.002, momentum=0.9, weight_decay=0.01),
            lambda p: torch.optim.SGD(p, lr=0.002, momentum=0.9, weight_decay=0.01),
            False,
            True,
        ),
        (Adagrad(lr=0.05), lambda p: torch.optim.Adagrad(p, lr=0.05), True, False),
        (
            Adagrad(lr=0.05, initial_accumulator=0.1, eps=1e-3, weight_decay=0.02),
            lambda p: torch.optim.Adagrad(
                p, lr=0.05, initial_accumulator_value=0.1, eps=1e-3, weight_decay=0.02
            ),
            False,
            True,
        ),
        (Adam(lr=0.01), lambda p: torch.optim.SparseAdam(list(p), lr=0.01), True, False),
    ],
)
def test_updates_equal_torchs_to_1e_6(optimizer, reference, sparse, all_rows, pooling):
    ours, theirs = both(
        optimizer, reference, sparse=sparse, batches=batches(all_rows=all_rows), pooling=pooling
    )
    # The project's promise; rows are below 2, so this is 4 to 8 roundings of float32 over 25 steps.
    assert np.abs(ours - theirs).max() <= 1e-6


def by_hand(optimizer, step, gradients):
    table = EmbeddingTable(DIM, capacity=4, optimizer=optimizer, initial=(-1, 1))
    row = table.initial_row(9)[:DIM].astype(np.float64)
    state = np.zeros(2 * DIM)
    for count, gradient in enumerate(gradients, start=1):
        _, lookup = table.lookup(Bags.of([9]))
        table.apply_gradients(lookup, gradient[None])
        row = step(row, state, gradient.astype(np.float64), count)
    assert table.rows_of([9])[0] == pytest.approx(row, abs=1e-6)


GRADIENTS = np.random.default_rng(3).standard_normal((20, DIM)).astype(np.float32)


def test_row_wise_adagrad_keeps_the_mean_square_of_a_row():
    def step(row, state, gradient, count):
        state[0] += np.mean(gradient**2)
        return row - 0.05 * gradient / (np.sqrt(state[0]) + 1e-8)

    by_hand(RowWiseAdagrad(lr=0.05), step, GRADIENTS)


def test_adagrad_in_persias_order_divides_by_the_accumulator_from_before():
    def step(row, state, gradient, count):
        accumulator = state[:DIM] if count > 1 else np.full(DIM, 0.01)
        new = row - 0.05 * gradient / np.sqrt(accumulator + 1e-10)
        state[:DIM] = accumulator + gradient**2
        return np.clip(new, -10, 10)

    by_hand(Adagrad(lr=0.05, initial_accumulator=0.01, order="persia", bound=10.0), step, GRADIENTS)


def test_adams_first_update_is_corrected_by_beta_and_not_by_its_square():
    # m/(1-b1) = g and v/(1-b2) = g² after one step, whatever the betas: the update is lr times the sign.
    table = EmbeddingTable(DIM, capacity=4, optimizer=Adam(lr=0.5, eps=0.0))
    before, lookup = table.lookup(Bags.of([9]))
    table.apply_gradients(lookup, GRADIENTS[:1])
    assert before[0] - table.rows_of([9])[0] == pytest.approx(0.5 * np.sign(GRADIENTS[0]), rel=1e-5)


def test_adams_count_is_kept_and_loaded():
    def make():
        return EmbeddingTable(DIM, capacity=4, optimizer=Adam(lr=0.5))

    first, second = make(), make()
    for table, gradients in ((first, GRADIENTS[:3]), (second, ())):
        for gradient in gradients:
            table.apply_gradients(table.lookup(Bags.of([9]))[1], gradient[None])
    second.load_state_dict(first.state_dict())
    for table in (first, second):
        table.apply_gradients(table.lookup(Bags.of([9]))[1], GRADIENTS[3][None])
    assert np.array_equal(first.rows_of([9]), second.rows_of([9]))


@pytest.mark.parametrize("dim", [1, 7, 8, 9, 16, 32, 33, 64, 128])
def test_every_element_is_computed_alike_whatever_the_dim(dim):
    table = EmbeddingTable(dim, capacity=4, optimizer=Adagrad(lr=0.1), initial=(0.5, 0.5))
    for _ in range(3):
        table.apply_gradients(table.lookup(Bags.of([1]))[1], np.full((1, dim), 0.3, dtype=np.float32))
    assert len(set(table.rows_of([1])[0].tolist())) == 1


def test_the_learning_rate_can_be_changed_while_training():
    table = EmbeddingTable(2, capacity=4, optimizer=Sgd(lr=1.0))
    table.learning_rate = 0.25
    before, lookup = table.lookup(Bags.of([1]))
    table.apply_gradients(lookup, np.ones((1, 2), dtype=np.float32))
    assert (before - np.float32(0.25)).tolist() == table.rows_of([1]).tolist()


def test_no_element_leaves_the_bound():
    table = EmbeddingTable(2, capacity=4, optimizer=Sgd(lr=1.0, bound=0.5))
    table.apply_gradients(table.lookup(Bags.of([1]))[1], np.array([[9, -9]], dtype=np.float32))
    assert table.rows_of([1]).tolist() == [[-0.5, 0.5]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sgd(lr=-1), "lr is -1"),
        (lambda: Sgd(momentum=1.0), "momentum is 1.0"),
        (lambda: Adam(betas=(0.9, 1.0)), "beta is 1.0"),
        (lambda: Adagrad(eps=float("nan")), "eps is nan"),
        (lambda: Adagrad(order="persian", initial_accumulator=0.1), "Did you mean 'persia'"),
        (lambda: Adagrad(order="persia"), "Give 0.01"),
        (lambda: Sgd(bound=0), "bound is 0"),
    ],
)
def test_settings_without_sense_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
