"""Training loops off the beaten path do what they do under DDP, or are refused."""

from pathlib import Path

import pytest
import torch

FILE = str(Path(__file__).with_name("loop_cases.py"))
FEW_BITS = ["bytegrad", "onebit", "topk", "powersgd"]


@pytest.fixture(scope="module")
def like_ddp(in_world):
    return in_world(FILE, "like_ddp", 2)


@pytest.mark.parametrize("name", ["unused", "frozen", "kept", "checkpointed", "normed", "optimizer after"])
def test_plain_averages_do_what_ddp_does(like_ddp, name):
    for found in like_ddp:
        ddp, ours = found[name]
        # Means of two numbers: DDP halves and adds, we add and halve, which is the same but for denormals.
        torch.testing.assert_close(ours, ddp, atol=1e-7, rtol=1e-6)


def test_what_no_rank_uses_is_left_alone_in_few_bits_too(in_world):
    found = in_world(FILE, "quantised", 2, FEW_BITS)
    for name in FEW_BITS:
        assert all(not each[name]["moved"].any() for each in found)
        assert torch.equal(found[0][name]["weights"], found[1][name]["weights"])


def test_a_closure_loses_no_update(in_world):
    for found in in_world(FILE, "closures", 2):
        for peers in ("shift_one", "all"):
            loop, closure = found[f"{peers} loop"], found[f"{peers} closure"]
            assert loop[-1] < 0.1 * loop[0]
            # The same step from the same weights, but for rounding, which a linear model does not amplify.
            assert closure == pytest.approx(loop, rel=1e-3)


def test_after_an_exception_in_backward_ranks_are_averaged_again(in_world):
    first, second = in_world(FILE, "caught", 2)
    assert torch.equal(first, second)


@pytest.mark.parametrize("names", [["gradient_allreduce", *FEW_BITS, "qadam"]])
def test_an_infinite_gradient_on_one_rank_skips_one_step_on_all(in_world, names):
    first, second = in_world(FILE, "infinite", 2, names)
    for name in names:
        assert first[name][0] == second[name][0] == 1, name
        assert all(map(torch.isfinite, map(torch.tensor, first[name]))), name
        assert first[name][9:] == second[name][9:], "all ranks have the same weights"


def test_weights_that_are_loaded_after_wrapping_stay(in_world):
    for found in in_world(FILE, "loaded", 2):
        for name, error in found.items():
            # Thirds of three replicas add up to a whole but for a rounding of numbers below 1.
            assert error <= (2.0**-23 if name == "low_precision_decentralized" else 0), name


def test_weights_are_averaged_while_averaging_goes_on_in_the_background(in_world):
    first, second = in_world(FILE, "averaged", 2)
    assert len(first) == 8
    assert all(map(torch.equal, first, second))


def test_qadam_is_not_destroyed_by_gradients_of_almost_0_nor_by_a_layer_that_is_used_late(in_world):
    found = in_world(FILE, "no_gradients", 2)[0]
    _, plain, largest = found["None"]
    for bits in ("8", "1"):
        first, last, most = found[bits]
        assert last < 0.3 * first
        assert last < 2 * plain + 0.02
        assert most < 2 * largest


def test_what_qadam_sends_is_clipped_and_free_of_the_loss_scale(in_world):
    for found in in_world(FILE, "clipped", 2):
        plain, clipped_move = found["1.0 None"][0], found["1.0 1.0"][1]
        # Scaled by a power of two: the same bits. A bound that nothing reaches changes nothing.
        assert torch.equal(found["1024.0 None"][0], plain)
        assert torch.equal(found["1.0 1000000000.0"][0], plain)
        assert clipped_move.abs().max() < 0.5 * found["1.0 None"][1].abs().max()


def test_a_checkpoint_keeps_numbers_of_numpy_and_refuses_what_could_not_be_read_back(in_world, tmp_path):
    for loaded, refused in in_world(FILE, "saved", 2, str(tmp_path)):
        assert loaded == "(1, {'best': 0.5})"
        assert refused.startswith("UsageError: where is PosixPath")


def test_checkpoints_of_another_number_of_ranks_are_named(in_world, tmp_path):
    in_world(FILE, "saved", 2, str(tmp_path))
    for said in in_world(FILE, "other_world", 3, str(tmp_path)):
        assert said.startswith("InputError: ")
        assert "has checkpoints of 2 ranks; these are 3. Start as many as before" in said


def test_a_layer_used_twice_under_reentrant_checkpointing_is_refused_where_it_cannot_be_right(in_world):
    for said in in_world(FILE, "twice", 2):
        assert said.startswith("UsageError: A parameter got its gradient twice")
        assert "use_reentrant=False" in said


def test_what_cannot_be_trained_together_is_refused_by_name(in_world):
    words = (
        "wrapped already, by DistributedDataParallel",
        "weight is on the meta device",
        "w is torch.complex64",
        "sparse=False",
        "local_sgd works around the optimizer's step",
        "Wanted a torch optimizer, found str",
        "moves none of the model's parameters",
        "An algorithm is a name or an Algorithm, found int",
        "bucket_bytes=0",
        "patience_s=0",
        "a whole number of steps apart",
        "step() without a closure",
        "lists each of the ranks 0 to 1 once, found [[0]]",
    )
    for said in in_world(FILE, "refused", 2):
        for answer, wanted in zip(said, words, strict=True):
            assert answer.startswith("UsageError: "), answer
            assert wanted in answer
