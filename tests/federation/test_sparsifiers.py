"""What is kept of a batch of activations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from capstan.errors import InputError, UsageError
from capstan.federation.sparsifiers import ErrorFeedback, RandomTopK, Threshold, TopK

RNG = np.random.default_rng(0)
batches = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(1, 40)), elements=st.floats(-3, 3, width=16)
)


@given(values=batches, keep=st.floats(0.01, 1), per=st.sampled_from(["sample", "tensor"]))
def test_top_k_keeps_the_largest_and_of_equal_ones_the_first(values, keep, per):
    sparsifier = TopK(keep=keep, per=per)
    chosen = sparsifier.choose(values, RNG)
    space = sparsifier.space(*values.shape)
    assert len(chosen) == space.kept
    rows = values if per == "sample" else values.reshape(1, -1)
    wanted = []
    for at, row in enumerate(rows):
        order = np.argsort(-np.abs(row), kind="stable")[: space.kept // len(rows)]
        wanted += sorted(at * rows.shape[1] + order)
    assert chosen.tolist() == wanted


@given(values=batches, keep=st.floats(0.01, 1), alpha=st.floats(0, 1))
def test_random_top_k_keeps_as_many_of_each_sample(values, keep, alpha):
    sparsifier = RandomTopK(keep=keep, alpha=alpha)
    chosen = sparsifier.choose(values, RNG)
    space = sparsifier.space(*values.shape)
    assert (np.bincount(chosen // values.shape[1], minlength=len(values)) == space.kept // len(values)).all()
    if alpha == 0:
        assert chosen.tolist() == TopK(keep=keep).choose(values, RNG).tolist()


def test_random_top_k_takes_alpha_of_its_elements_from_the_others():
    values = np.random.default_rng(1).standard_normal((200, 100))
    top = set(TopK(keep=0.2).choose(values, RNG).tolist())
    chosen = RandomTopK(keep=0.2, alpha=0.25).choose(values, np.random.default_rng(2)).tolist()
    outside = sum(each not in top for each in chosen) / len(chosen)
    # 4000 draws of probability 0.25: a deviation of 0.007; four of them.
    assert outside == pytest.approx(0.25, abs=0.028)


def test_a_threshold_keeps_what_is_above_it():
    values = np.array([[0.5, -2.0, 1.0], [0.0, 0.0, 0.0]])
    assert Threshold(above=0.9).choose(values, RNG).tolist() == [1, 2]
    assert Threshold(above=0.9).space(2, 3) is None


def test_error_feedback_sends_everything_in_the_end():
    feedback, sparsifier = ErrorFeedback(), TopK(keep=0.25)
    value = np.random.default_rng(0).standard_normal((2, 8))
    sent_sum = np.zeros_like(value)
    for _ in range(200):
        whole = feedback.add_rest("device 0", value)
        sent = np.zeros_like(whole)
        chosen = sparsifier.choose(whole, RNG)
        sent.flat[chosen] = whole.flat[chosen]
        feedback.keep_rest("device 0", whole, sent)
        sent_sum += sent
    # What is not sent yet stays bounded, by a few steps' values, so the mean tends to the value.
    np.testing.assert_allclose(sent_sum / 200, value, atol=0.1)
    np.testing.assert_allclose(sent_sum + feedback.rests["device 0"], 200 * value, rtol=1e-9)
    assert feedback.add_rest("device 0", np.ones((1, 8))).tolist() == np.ones((1, 8)).tolist()


def test_what_cannot_be_is_refused():
    for make in (
        lambda: TopK(keep=0),
        lambda: TopK(keep=1.1),
        lambda: TopK(keep=0.1, per="row"),
        lambda: RandomTopK(keep=0.1, alpha=2),
        lambda: Threshold(above=-1),
        lambda: Threshold(above=float("nan")),
    ):
        with pytest.raises(UsageError, match="must be"):
            make()
    with pytest.raises(InputError, match="diverged"):
        TopK(keep=0.5).choose(np.array([[np.nan, 1]]), RNG)
    with pytest.raises(InputError, match="samples, width"):
        TopK(keep=0.5).choose(np.ones(3), RNG)
