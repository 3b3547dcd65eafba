"""Ranks may have unequally many batches inside `join`."""

from pathlib import Path

import torch

FILE = str(Path(__file__).with_name("uneven_cases.py"))
GRADIENTS = ["gradient_allreduce", "bytegrad", "onebit", "topk", "randomk", "powersgd"]
WEIGHTS = ["decentralized", "low_precision_decentralized", "local_sgd", "diloco"]


def test_plain_averages_with_uneven_inputs_are_ddps_and_no_algorithm_hangs(in_world):
    first, second = in_world(FILE, "epochs", 2, ["DDP", *GRADIENTS, *WEIGHTS])
    for epoch in range(4):
        # Means of two numbers, as in test_loops.py.
        torch.testing.assert_close(
            first["gradient_allreduce"][epoch], first["DDP"][epoch], atol=1e-6, rtol=1e-5
        )
        for name in GRADIENTS:
            assert torch.equal(first[name][epoch][:32], second[name][epoch][:32]), (name, epoch)
    for name in [*GRADIENTS, *WEIGHTS]:
        assert first[name][3].isfinite().all()
        assert not torch.equal(first[name][3], first[name][0])


def test_all_end_with_the_weights_buffers_and_momenta_of_a_rank_that_went_on_longest(in_world):
    first, second = in_world(FILE, "with_momentum", 2, ["gradient_allreduce", "onebit"])
    for name, state in first.items():
        assert all(map(torch.equal, state, second[name])), name


def test_a_rank_without_batches_lends_its_weights(in_world):
    idle, busy = in_world(FILE, "lone", 2)
    start = torch.manual_seed(0) and torch.nn.Linear(4, 2, bias=False).weight.detach()
    # Every step takes 0.1 off; before it both take the mean of what they had.
    mine, theirs = start.clone(), start.clone()
    for step in range(3):
        mean = (mine + theirs) / 2
        mine, theirs = mean, mean - 0.1
        torch.testing.assert_close(busy["decentralized"][step], theirs)
    torch.testing.assert_close(idle["decentralized"][-1], mine)
    assert len(busy["local_sgd"]) == 4


def test_who_cannot_and_ranks_that_do_different_things_are_told(in_world):
    for qadam, different in in_world(FILE, "refused", 2):
        assert qadam.startswith("UsageError: qadam needs every rank's step")
        assert "rank 0 is at its buffers, rank 1 at its gradients" in different


def test_averaging_in_the_background_waits_for_no_rank(in_world):
    first, second = in_world(FILE, "free", 2)
    assert all(map(torch.equal, first, second))


def test_a_rank_that_dies_inside_is_named(in_world):
    said, nothing = in_world(FILE, "lost", 2, failing=1)
    assert said.startswith("DeviceError: Rank 1 is gone")
    assert nothing is None
