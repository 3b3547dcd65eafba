"""Training that is interrupted, loses a rank, averages in the background, accumulates, or is set up
wrongly.
"""

from pathlib import Path

import pytest
import torch

FILE = str(Path(__file__).with_name("training_cases.py"))
NAMES = ["gradient_allreduce", "bytegrad", "onebit", "randomk", "powersgd", "qadam"]
NAMES += ["decentralized", "low_precision_decentralized", "local_sgd", "diloco"]


def test_a_checkpoint_goes_on_exactly(in_world, tmp_path):
    found = in_world(FILE, "interrupted", 2, {"names": NAMES, "folder": str(tmp_path)})
    for each in found:
        for name in NAMES:
            whole, halves = each[name]
            assert len(whole) == 10
            assert halves == whole


@pytest.mark.parametrize(
    ("name", "size"), [("gradient_allreduce", 3), ("onebit", 4), ("decentralized", 3), ("decentralized", 4)]
)
def test_when_a_rank_is_killed_all_others_fail_naming_it_and_only_it(in_world, name, size):
    found = in_world(FILE, "losing", size, {"name": name, "fate": "killed"}, failing=1)
    for each in found[: size - 1]:
        # Of three decentralised ranks one sits out in each round, and notices in the next.
        assert each["step"] in ((3, 4) if name == "decentralized" else (3,))
        assert each["error"].startswith(f"DeviceError: Rank {size - 1} is gone, of {size}: ")
        assert "bucket" in each["error"]


@pytest.mark.parametrize("fate", ["stopped", "slow"])
@pytest.mark.parametrize(("name", "size"), [("bytegrad", 3), ("gradient_allreduce", 4)])
def test_when_a_rank_is_silent_all_others_fail_naming_it_and_only_it(in_world, name, size, fate):
    found = in_world(FILE, "losing", size, {"name": name, "fate": fate}, failing=int(fate == "stopped"))
    for each in found[: size - 1]:
        assert each["step"] == 3
        assert each["error"].startswith(f"TimeoutExpired: Rank {size - 1} of {size} did not answer rank ")
        assert "bucket" in each["error"]


def test_async_averaging_keeps_the_sum_and_survives_a_hundred_aborts(in_world):
    found = in_world(FILE, "asynchronous", 3, {"cycles": 100})
    before, after = (sum(each[key] for each in found) for key in ("before", "after"))
    # Every round sums three numbers, divides them, and adds the difference, on 3 ranks: five roundings of
    # numbers below 8.
    rounds = max(each["rounds"] for each in found)
    assert rounds >= 3
    torch.testing.assert_close(after, before, atol=rounds * 3 * 5 * 8 * 2.0**-24, rtol=0)
    spread = max((each["after"] - found[0]["after"]).abs().max().item() for each in found)
    assert spread < 1e-5
    assert all(torch.equal(each["averaged"], found[0]["averaged"]) for each in found)
    mean = sum(each["trained"] for each in found) / 3
    torch.testing.assert_close(found[0]["averaged"], mean, atol=1e-6, rtol=1e-6)


def test_a_script_may_end_while_it_averages_in_the_background(fork, torchrun):
    ranks = [fork(FILE, "unclosed", environment=each) for each in torchrun(2)]
    assert [rank.wait(60) for rank in ranks] == [0, 0], "".join(rank.err for rank in ranks)


def test_gradients_are_accumulated_clipped_and_those_that_nobody_has_stay_none(in_world):
    found = in_world(FILE, "unusual", 2)
    for each in found:
        numel = each["reference"].numel()
        torch.testing.assert_close(each["weights"][:numel], each["reference"], atol=1e-6, rtol=1e-5)
        assert each["spare gradient"] is None
        assert each["norm"] > 0


def test_ranks_with_different_algorithms_are_told_at_once(in_world):
    for said in in_world(FILE, "disagreeing", 2):
        assert said.startswith("UsageError: Rank")
        assert "another algorithm" in said


def test_what_cannot_work_is_refused(in_world):
    for unknown, empty, optimizer, frozen in in_world(FILE, "misused", 2):
        assert "Did you mean 'bytegrad'" in unknown
        assert "There is no algorithm ''" in empty
        assert "QAdam" in optimizer
        assert "onebit" in optimizer
        assert "No parameter" in frozen
