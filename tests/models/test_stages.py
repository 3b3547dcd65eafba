"""A causal language model in stages: together they are the whole model, and each is only its part."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from capstan.errors import InputError, UnsupportedModel, UsageError
from capstan.models import Stage, cut_causal_lm, load_stage
from capstan.storage import Checkpoint

# 0 is padding, whose row of the embedding gets no gradient in families that say so.
TOKENS = torch.tensor([[5, 0, 7, 90, 11, 3, 0, 8], [1, 2, 2, 2, 60, 61, 62, 4]])


def stages_of(folder: Path, num_stages: int, **how: Any) -> list[Stage]:
    return [load_stage(folder, cut, **how) for cut in cut_causal_lm(folder, num_stages, **how)]


def run(stages: Sequence[Stage], values: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The last stage's output, and what crossed each boundary."""
    crossed = []
    for stage in stages:
        values = stage(values)
        crossed.append(values)
    return crossed[-1], crossed[:-1]


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients_of(stages: Sequence[Stage]) -> dict[str, Tensor]:
    """By their names in the whole model; both copies of a tied weight summed."""
    found: dict[str, Tensor] = {}
    for stage in stages:
        for name, parameter in stage.model.named_parameters():
            assert name not in found
            if parameter.grad is not None:
                found[name] = parameter.grad
    tied = [stage.tied_weight for stage in stages if stage.tied_weight is not None]
    if tied:
        assert len(tied) == 2
        embedding = next(name for name, gradient in found.items() if gradient is tied[0].grad)
        head = next(name for name, gradient in found.items() if gradient is tied[1].grad)
        found[embedding] = found[embedding] + found.pop(head)
    return found


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_stages_give_the_whole_model_s_logits_and_gradients(
    folder_of: Callable[[str], Path], family: str, num_stages: int
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder_of(family), dtype=torch.float32).train()
    expected = whole(TOKENS, use_cache=False).logits
    loss_of(expected, TOKENS).backward()
    stages = stages_of(folder_of(family), num_stages)
    logits, crossed = run(stages, TOKENS)
    loss_of(logits, TOKENS).backward()
    # The same operations in the same order: what differs is at most how gradients of a tie are added.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert [values.shape for values in crossed] == [(2, 8, 32)] * (num_stages - 1)
    wanted = {name: each.grad for name, each in whole.named_parameters() if each.grad is not None}
    found = gradients_of(stages)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6, msg=name)
