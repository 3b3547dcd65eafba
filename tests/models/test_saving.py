"""Stages are saved as one checkpoint, which is the whole model again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from capstan.errors import InputError, UsageError
from capstan.models import Stage, cut_causal_lm, load_stage, save_stage

TOKENS = torch.tensor([[5, 0, 7, 90, 11, 3, 0, 8], [1, 2, 2, 2, 60, 61, 62, 4]])


def trained(folder: Path, num_stages: int) -> list[Stage]:
    """Stages whose weights are no longer the folder's; copies of one weight are equal."""
    stages = [load_stage(folder, cut) for cut in cut_causal_lm(folder, num_stages)]
    with torch.no_grad():
        for stage in stages:
            for parameter in stage.parameters():
                parameter.mul_(1.25)
    return stages


def save(stages: list[Stage], source: Path, target: Path) -> None:
    cuts = [stage.cut for stage in stages]
    for stage in reversed(stages):
        save_stage(stage, cuts, source, target)


@pytest.mark.parametrize("num_stages", [1, 3])
def test_what_was_saved_computes_what_the_stages_compute(
    folder_of: Callable[[str], Path], family: str, num_stages: int, tmp_path: Path
) -> None:
    stages = trained(folder_of(family), num_stages)
    values = TOKENS
    for stage in stages:
        values = stage(values)
    for _ in range(2):  # again, as after another epoch
        save(stages, folder_of(family), tmp_path / "out")
    whole, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {name: each for name, each in found.items() if each} == {}
    assert {each.dtype for each in whole.parameters()} == {torch.float32}
    torch.testing.assert_close(whole.train()(TOKENS, use_cache=False).logits, values, rtol=0, atol=1e-6)
    again = cut_causal_lm(tmp_path / "out", num_stages)
    assert [cut.tensors for cut in again] == [stage.cut.tensors for stage in stages]


def test_config_says_the_new_dtype_and_a_tokenizer_comes_along(
    config_of: Callable[..., Any], save_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_model(config_of("llama"), dtype=torch.bfloat16)
    (folder / "tokenizer.json").write_text("{}")
    save(trained(folder, 2), folder, tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.float32


def test_weights_of_something_else_are_not_joined(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of("llama")
    stages = trained(folder, 2)
    with pytest.raises(UsageError, match="holds weights of another model"):
        save(stages, folder, folder)
    save(stages, folder, tmp_path)
    with pytest.raises(UsageError, match="holds weights of another model"):
        save(trained(folder, 3), folder, tmp_path)
    again = [load_stage(tmp_path, stage.cut) for stage in stages]
    with pytest.raises(UsageError, match="holds weights of another model"):
        save(again, tmp_path, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        save(stages, folder, tmp_path / "file")
    with pytest.raises(UsageError, match="Stage 1 is not one of the 1 cuts"):
        save_stage(stages[1], [stages[0].cut], folder, tmp_path)
