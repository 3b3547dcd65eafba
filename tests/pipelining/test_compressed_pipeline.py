"""Compressed messages: both ends hold the same, bytes are as the formula says, losses are named."""

from pathlib import Path

import pytest

FILE = str(Path(__file__).with_name("pipeline_cases.py"))
TOKENS, DIM, STEPS, BATCH, PARTS = 8, 16, 9, 6, 3  # 6 samples go in 3 micro-batches


def _group_bytes(bits: int, tokens: int) -> int:
    """Groups of 8 values along 16: two a token, each with its codes and two bfloat16."""
    return tokens * DIM // 8 * (8 * bits // 8 + 4)


@pytest.mark.parametrize(
    ("size", "schedule", "stochastic"), [(2, "gpipe", True), (4, "1f1b", False), (2, "1f1b", False)]
)
def test_ends_agree_after_every_step_and_bytes_are_the_formula_s(in_world, size, schedule, stochastic):
    compression = {"forward_bits": 3, "backward_bits": 6, "group_size": 8, "stochastic": stochastic}
    case = {"compression": compression, "schedule": schedule, "steps": STEPS, "batch": BATCH}
    ranks = in_world(FILE, "compressed", size, case | {"restart_at": 5, "spoil": True})
    without = in_world(FILE, "compressed", size, case)
    assert ranks[-1]["losses"] == without[-1]["losses"]

    import torch

    generator = torch.Generator().manual_seed(1)
    visits = [torch.randperm(16, generator=generator)[:BATCH].tolist() for _ in range(STEPS)]
    seen: set[int] = set()
    for step, ids in enumerate(visits):
        new = len(set(ids) - seen)
        seen |= set(ids)
        for rank, each in enumerate(ranks):
            wanted = {}
            if rank < size - 1:
                assert each["digests"][step][1] == ranks[rank + 1]["digests"][step][0]
                wanted[f"rank {rank}->rank {rank + 1} activations"] = new * TOKENS * DIM * 4 + (
                    BATCH - new
                ) * _group_bytes(3, TOKENS)
            if rank > 0:
                wanted[f"rank {rank}->rank {rank - 1} gradients"] = _group_bytes(6, BATCH * TOKENS)
            assert each["wire"][step] == wanted
    # What was spoilt on rank 1 is found on every rank, forgotten, and then well again.
    assert [each["repaired"] for each in ranks] == [[[], [0], []]] * size


def test_direct_quantisation_needs_no_ids_and_holds_nothing(in_world):
    compression = {"forward_bits": 4, "backward_bits": 8, "group_size": 8, "changes": False}
    case = {"compression": compression, "schedule": "1f1b", "steps": 2, "batch": BATCH}
    ranks = in_world(FILE, "compressed", 2, case)
    for step in range(2):
        key = "rank 0->rank 1 activations"
        assert ranks[0]["wire"][step][key] == _group_bytes(4, BATCH * TOKENS)


@pytest.mark.parametrize(
    ("fate", "lost", "kind"),
    [("killed", 2, "DeviceError: Rank 2 is gone"), ("stopped", 1, "TimeoutExpired: Rank 1 of 3 did not")],
)
def test_a_lost_rank_is_named_by_all_others_in_bounded_time(in_world, fate, lost, kind):
    ranks = in_world(FILE, "losing", 3, {"fate": fate, "lost": lost}, failing=1)
    for rank, each in enumerate(ranks):
        if rank != lost:
            assert each["step"] in (1, 2)  # a rank may still be in the step before
            assert each["error"].startswith(kind)
            assert "pipeline step" in each["error"]


def test_what_cannot_be_right_is_refused(in_world):
    for found in in_world(FILE, "wrong", 2):
        layers, tied, norm, kind, schedule, parts, no_ids, few_ids, tokens = found
        assert "UsageError: A model of 1 layers cannot be cut into 2 stages" in layers
        assert "UnsupportedModel: Stages 0 and 1 would share" in tied
        assert "BatchNorm1d: its averages would be of micro-batches" in norm
        assert "Only an nn.Sequential can be cut into stages, found ModuleList" in kind
        assert "Did you mean '1f1b'" in schedule
        assert "UsageError: A batch goes in 1 micro-batch or more, found 0" in parts
        assert "UsageError: Changes are sent by sample: give sample_ids" in no_ids
        assert "InputError: There are 4 samples and 1 sample ids" in few_ids
        assert "one floating-point tensor must pass, found torch.int64" in tokens
