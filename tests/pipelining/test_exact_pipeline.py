"""Without compression a pipeline trains what one process trains."""

from pathlib import Path

import pytest
import torch

FILE = str(Path(__file__).with_name("pipeline_cases.py"))


@pytest.fixture(scope="module")
def cases():
    import importlib.util

    spec = importlib.util.spec_from_file_location("pipeline_cases", FILE)
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    return cases


@pytest.fixture(scope="module")
def alone(cases):
    return cases.alone


# By default on 2 stages; a Llama's fifty steps run on 4.
@pytest.mark.covering(1)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_fifty_steps_are_those_of_one_process(in_world, alone, schedule, size):
    losses, weights = alone(50, 8)
    ranks = in_world(FILE, "exact", size, {"schedule": schedule, "steps": 50, "batch": 8})
    # The mean of micro-batches' means and the batch's mean differ by roundings of 2**-24; the bar is 1e-6.
    assert ranks[-1]["losses"] == pytest.approx(losses, rel=1e-6)
    assert all(loss is None for each in ranks[:-1] for loss in each["losses"])
    found = [weight for each in ranks for weight in each["weights"]]
    for weight, wanted in zip(found, weights, strict=True):
        torch.testing.assert_close(weight, wanted, atol=1e-5, rtol=1e-5)
    # 50 batches of 8 x 8 x 16 float32 each way, and the last one of 16 samples forward only.
    activations, gradients = (50 * 8 + 16) * 8 * 16 * 4, 50 * 8 * 8 * 16 * 4
    for rank, each in enumerate(ranks):
        wanted = {}
        if rank < size - 1:
            wanted[f"rank {rank}->rank {rank + 1} activations"] = activations
        if rank > 0:
            wanted[f"rank {rank}->rank {rank - 1} gradients"] = gradients
        assert each["bytes"] == wanted


@pytest.mark.parametrize("parts", [1, 4])
def test_gradients_of_several_steps_add_up_as_backward_does(in_world, cases, parts):
    ranks = in_world(FILE, "adding_up", 2, {"parts": parts})
    found = [gradient for each in ranks for gradient in each]
    for gradient, wanted in zip(found, cases.added_up(), strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("batch", [6, 5, 1])
def test_batches_that_do_not_divide_and_a_common_norm(in_world, alone, batch):
    losses, _ = alone(4, batch, clip=0.5)
    ranks = in_world(FILE, "exact", 2, {"schedule": "1f1b", "steps": 4, "batch": batch, "clip": 0.5})
    assert ranks[-1]["losses"] == pytest.approx(losses, rel=1e-6)
