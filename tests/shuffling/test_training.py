"""Linear models: their gradients, that they learn in the orders that they should, and go on after a kill."""

import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from capstan.errors import CapstanError, InputError, UsageError
from capstan.plans import Trace
from capstan.shuffling import Examples, LinearModel, Training, choose_columns, survey, train
from capstan.shuffling.linear_models import MODELS
from capstan.storage import NumpyBlocks

from . import tables
from .tables import run_of_test, sorted_table


def torch_loss(kind, outputs, y):
    signs = torch.where(y > 0, 1.0, -1.0).to(outputs.dtype)
    return {
        "linear": lambda: 0.5 * (outputs[:, 0] - y) ** 2,
        "logistic": lambda: torch.nn.functional.softplus(-signs * outputs[:, 0]),
        "svm": lambda: torch.relu(1 - signs * outputs[:, 0]),
        "softmax": lambda: torch.nn.functional.cross_entropy(outputs, y, reduction="none"),
    }[kind]()


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_a_step_is_what_torch_does_with_the_same_loss(kind):
    rng = np.random.default_rng(0)
    classes = 3 if kind == "softmax" else 2
    x, y = rng.normal(size=(10, 4)), rng.integers(0, classes, 10)
    model = LinearModel.begin(kind, 4, classes)
    model.weights[:] = rng.normal(size=model.weights.shape)
    weights = torch.tensor(model.weights, requires_grad=True)
    outputs = torch.tensor(x) @ weights[:-1] + weights[-1]
    losses = torch_loss(kind, outputs, torch.tensor(y))
    losses.mean().backward()
    each = model.gradients(x, y)
    found = model.step(x, y, lr=0.3)
    # Sums of ten float64 products of size 1, in another order.
    assert found == pytest.approx(losses.sum().item(), rel=1e-12)
    wanted = (weights.detach() - 0.3 * weights.grad).numpy()
    assert np.allclose(model.weights, wanted, rtol=0, atol=1e-12)
    assert np.allclose(each.mean(axis=0), weights.grad.numpy().ravel(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["logistic", "softmax"])
def test_large_outputs_overflow_nowhere(kind):
    model = LinearModel.begin(kind, 1, 2)
    model.weights[0] = 1e4 if kind == "logistic" else [1e4, -1e4]
    assert model.step(np.array([[1.0], [-1.0]]), np.array([0, 1]), 0.1) == pytest.approx(2e4, rel=1.01)
    assert np.isfinite(model.weights).all()


def test_a_survey_is_what_numpy_says_of_the_whole_table():
    table = sorted_table(500)
    table["still"], table["text"] = np.full(500, 7.3), np.array(["a", "b"])[table["y"]]
    examples = survey(NumpyBlocks(table, rows_per_block=33), label="text", is_regression=False)
    assert examples.features == ("f0", "f1", "f2", "f3", "f4", "y", "still")
    assert examples.classes == ("a", "b")
    whole = np.stack([table[name] for name in examples.features], axis=1)
    # Sums of 500 float64 in another order: relative errors of some 500 · 2**-53.
    assert np.allclose(examples.mean, whole.mean(axis=0), rtol=1e-12)
    assert np.allclose(examples.scale[:6], 1 / whole.std(axis=0)[:6], rtol=1e-12)
    assert examples.scale[6] == 0
    assert (examples.x(table)[:, 6] == 0).all()
    assert examples.y({"text": np.array(["b", "a", "c"])}).tolist() == [1, 0, -1]
    again = Examples.from_dict(examples.to_dict())
    assert np.array_equal(again.mean, examples.mean)
    assert again.classes == examples.classes


def test_values_that_are_no_examples_are_refused():
    def surveyed(columns, **more):
        source = NumpyBlocks(columns, rows_per_block=2)
        return survey(source, **{"label": "y", "is_regression": False} | more)

    good = {"a": np.arange(4.0), "t": np.array(["x"] * 4), "y": np.array([0, 0, 1, 1])}
    assert surveyed(good).features == ("a",)
    with pytest.raises(InputError, match="'a' has values that are not finite"):
        surveyed(good | {"a": np.array([0, 1, np.nan, 2])})
    with pytest.raises(InputError, match="'y' has values that are not finite"):
        surveyed(good | {"y": np.array([0, 1, np.inf, 2])})
    with pytest.raises(UsageError, match=r"no column \(for the label\) 'z'"):
        surveyed(good, label="z")
    with pytest.raises(UsageError, match=r"no column \(for a feature\) 'b'"):
        surveyed(good, features=["b"])
    with pytest.raises(UsageError, match="'y' is the label"):
        surveyed(good, features=["y"])
    with pytest.raises(UsageError, match="'t' is <U1; wanted numbers"):
        surveyed(good, features=["t"])
    with pytest.raises(UsageError, match="No column beside the label"):
        surveyed({"t": good["t"], "y": good["y"]})
    with pytest.raises(UsageError, match="linear regression wants numbers"):
        surveyed(good, label="t", is_regression=True)
    with pytest.raises(UsageError, match="is a list in every row"):
        choose_columns({"y": np.zeros((2, 2)), "a": np.zeros(2)}, label="y")


@pytest.mark.parametrize("kind", ["logistic", "svm", "softmax"])
def test_on_sorted_rows_a_tenth_as_buffer_is_as_good_as_a_full_shuffle(kind):
    classes = 3 if kind == "softmax" else 2
    source = NumpyBlocks(sorted_table(4000, classes), rows_per_block=40)
    test = NumpyBlocks(sorted_table(4000, classes), rows_per_block=4000)
    scores = {}
    for strategy in ("full", "corgipile", "none"):
        training = Training(label="y", model=kind, strategy=strategy, buffer_blocks=10, epochs=2)
        scores[strategy] = train(source, training, test=test).score["accuracy"]
    # The bar of the paper's claim; stored order must fail it by far, or the table shows nothing.
    assert abs(scores["corgipile"] - scores["full"]) <= 0.005
    assert scores["none"] < scores["full"] - 0.02


def test_linear_regression_finds_the_line():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 3)) * [1, 10, 100]
    y = np.sort(x @ [5.0, 0.5, 0.05] + 40)
    x = x[np.argsort(x @ [5.0, 0.5, 0.05] + 40)]
    source = NumpyBlocks({"a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "y": y}, rows_per_block=20)
    done = train(source, Training(label="y", model="linear", buffer_blocks=10, epochs=5))
    assert done.score["r2"] > 0.99
    assert done.score["mean_squared_error"] < 0.01 * y.var()


def test_without_averaging_the_last_weights_are_judged():
    source, training = run_of_test()
    last = train(source, replace(training, averages=False, strategy="none", epochs=1))
    by_hand = LinearModel.begin("svm", 5, 2)
    rows = source.read(0)
    for block in range(50):
        rows = source.read(block)
        by_hand.step(last.examples.x(rows), last.examples.y(rows), 0.2)
    assert np.array_equal(last.model.weights, by_hand.weights)


def test_the_trace_counts_the_bytes_of_each_pass():
    source, training = run_of_test()
    done = train(source, training)
    once = 800 * 6 * 8
    assert {phase.name: phase.traffic.on("disk->host") for phase in done.trace.phases} == {
        "statistics": once,
        "epochs": 3 * once,
        "evaluation": once,
    }
    assert done.trace.phase("epochs").counts == {"rows": 2400}
    assert Trace.from_dict(done.trace.to_dict()) == done.trace
    assert [report.epoch for report in done.reports] == [0, 1, 2]


@pytest.mark.parametrize(("epoch", "step"), [(0, 1), (0, 50), (2, 49)])
def test_killed_in_mid_epoch_it_goes_on_to_the_same_model(tmp_path, fork, epoch, step):
    source, training = run_of_test()
    whole = train(source, training)
    killed = fork(tables.__file__, "kill_itself_at", str(tmp_path), epoch, step)
    assert killed.wait(60) == -signal.SIGKILL
    steps = []
    done = train(source, training, checkpoint=tmp_path / "state.npz", on_step=lambda *at: steps.append(at))
    assert np.array_equal(done.model.weights, whole.model.weights)
    assert [report.loss for report in done.reports] == [report.loss for report in whole.reports]
    assert steps[0] == ((epoch, step + 1) if step < 50 else (epoch + 1, 1))
    assert len(steps) == 150 - epoch * 50 - step
    assert "went on at epoch" in done.trace.notes[0]


def test_a_finished_checkpoint_is_the_answer_and_another_run_is_refused(tmp_path):
    source, training = run_of_test()
    place = tmp_path / "state.npz"
    first = train(source, training, checkpoint=place)
    again = train(source, training, checkpoint=place, on_step=lambda *_: pytest.fail("trained again"))
    assert np.array_equal(first.model.weights, again.model.weights)
    assert again.score == first.score
    with pytest.raises(InputError, match="of another run"):
        train(source, replace(training, seed=5), checkpoint=place)
    other = NumpyBlocks(sorted_table(800, seed=1), rows_per_block=16)
    with pytest.raises(InputError, match="of another run"):
        train(other, training, checkpoint=place)
    place.write_bytes(place.read_bytes()[:100])
    with pytest.raises(InputError, match="no checkpoint that"):
        train(source, training, checkpoint=place)


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"model": "logisticc"}, UsageError, "Did you mean 'logistic'"),
        ({"strategy": "sorted"}, UsageError, "no strategy 'sorted'"),
        ({"epochs": 0}, UsageError, "epochs is 0"),
        ({"seed": -1}, UsageError, "seed is -1"),
        ({"lr": 0.0}, UsageError, "lr is 0.0"),
        ({"model": "linear", "lr": 1e3}, InputError, "diverged in epoch"),
        ({"label": "f0"}, InputError, "logistic wants a label with two classes; this one has 400"),
    ],
)
def test_trainings_that_cannot_be_are_refused(wrong, error, says):
    source = NumpyBlocks(sorted_table(400), rows_per_block=20)
    with pytest.raises(CapstanError, match=says) as caught:
        train(source, Training(**{"label": "y", "model": "logistic"} | wrong))
    assert isinstance(caught.value, error)
