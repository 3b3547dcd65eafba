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


def test_micro_batches_in_flight_do_not_meet(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("llama")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for rows in TOKENS.split(1):
        loss_of(whole(rows, use_cache=False).logits, rows).backward()
    stages = stages_of(folder, 3)
    losses = [loss_of(run(stages, rows)[0], rows) for rows in TOKENS.split(1)]  # all forwards first
    for loss in reversed(losses):
        loss.backward()
    found = gradients_of(stages)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-6, msg=name)


def test_both_copies_of_a_tied_weight_stay_equal_when_their_gradients_are_summed(
    folder_of: Callable[[str], Path],
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder_of("gpt2"), dtype=torch.float32).train()
    stages = stages_of(folder_of("gpt2"), 3)
    assert stages[1].tied_weight is None
    first, last = (stage.tied_weight for stage in (stages[0], stages[2]))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (whole, *stages)]
    for _ in range(3):
        for each in optimizers:
            each.zero_grad()
        loss_of(whole(TOKENS, use_cache=False).logits, TOKENS).backward()
        loss_of(run(stages, TOKENS)[0], TOKENS).backward()
        total = first.grad + last.grad
        first.grad, last.grad = total, total.clone()
        for each in optimizers:
            each.step()
    assert torch.equal(first, last)
    torch.testing.assert_close(first, whole.get_input_embeddings().weight, rtol=0, atol=1e-6)


def test_a_single_stage_of_a_tied_model_has_one_weight(folder_of: Callable[[str], Path]) -> None:
    (stage,) = stages_of(folder_of("gpt2"), 1)
    assert stage.tied_weight is None
    assert stage.model.get_input_embeddings().weight is stage.model.get_output_embeddings().weight


def test_what_is_stored_as_two_matrices_is_two_though_the_config_ties_them(
    config_of: Callable[..., Any], save_model: Callable[..., Path]
) -> None:
    folder = save_model(config_of("llama"))  # its two matrices differ
    config = folder / "config.json"
    config.write_text(
        config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    assert '"tie_word_embeddings": true' in config.read_text()
    stages = stages_of(folder, 2)
    assert [stage.tied_weight for stage in stages] == [None, None]
    stored = AutoModelForCausalLM.from_pretrained(folder_without_tie(folder)).eval()
    torch.testing.assert_close(run(stages, TOKENS)[0], stored(TOKENS).logits, rtol=0, atol=1e-6)


def folder_without_tie(folder: Path) -> Path:
    config = folder / "config.json"
    config.write_text(
        config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    )
    return folder


def test_a_stage_reads_its_own_bytes_only(
    folder_of: Callable[[str], Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read, sizes = folder_of(family), Checkpoint.read, []

    def counted(self: Checkpoint, name: str, target: Tensor, **how: Any) -> None:
        sizes.append(target.numel())
        read(self, name, target, **how)

    monkeypatch.setattr(Checkpoint, "read", counted)
    cuts = cut_causal_lm(folder, 3)
    assert sum(sizes) == 0
    for cut in cuts:
        sizes.clear()
        load_stage(folder, cut)
        assert sum(sizes) == cut.stored_bytes
    twice = sum(
        Checkpoint(folder).tensors[name].size_bytes for name in tied_names(folder, cuts[0].table is not None)
    )
    assert sum(cut.stored_bytes for cut in cuts) == Checkpoint(folder).size_bytes + twice


def tied_names(folder: Path, is_tied: bool) -> list[str]:
    """Of a tied model's checkpoint the one matrix of the vocabulary, which both ends read."""
    shapes = {name: each.shape for name, each in Checkpoint(folder).tensors.items()}
    return [name for name, shape in shapes.items() if is_tied and shape[0] == 96 and len(shape) == 2]


def test_a_stage_holds_its_own_part_only_and_all_stages_the_whole_model(
    folder_of: Callable[[str], Path], family: str
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder_of(family), dtype=torch.float32).state_dict()
    cuts = cut_causal_lm(folder_of(family), 3)
    found: dict[str, Tensor] = {}
    for cut in cuts:
        stage = load_stage(folder_of(family), cut)
        assert sum(each.numel() for each in stage.parameters()) == cut.num_parameters
        assert not any(each.is_meta for each in (*stage.parameters(), *stage.buffers()))
        tensors = stage.tensors()
        assert set(tensors) == set(cut.tensors)
        assert found.keys() & tensors.keys() == set()
        found |= tensors
    assert found.keys() == whole.keys()
    assert [name for name, tensor in whole.items() if not torch.equal(found[name], tensor)] == []


def test_a_sharded_checkpoint_in_two_bytes_is_trained_in_four(
    config_of: Callable[..., Any], save_model: Callable[..., Path]
) -> None:
    folder = save_model(config_of("qwen3"), dtype=torch.bfloat16, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stages = stages_of(folder, 2)
    assert {each.dtype for stage in stages for each in stage.parameters()} == {torch.float32}
    torch.testing.assert_close(run(stages, TOKENS)[0], whole(TOKENS).logits, rtol=0, atol=1e-6)


def test_cuts_balance_arithmetic_and_the_head_counts_with_the_last_layer(
    config_of: Callable[..., Any], save_model: Callable[..., Path]
) -> None:
    layer = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)  # q, o; k, v; gate, up, down
    cuts = cut_causal_lm(save_model(config_of("llama", vocab_size=400)), 2)  # a head of nearly two layers
    assert [(cut.first, cut.end) for cut in cuts] == [(0, 3), (3, 4)]
    assert [cut.flops_per_token for cut in cuts] == [3 * layer, layer + 2 * 32 * 400]
    assert [(cut.is_first, cut.is_last) for cut in cuts] == [(True, False), (False, True)]


# --- what is refused ---------------------------------------------------------------------------------------

PER_LAYER_INPUTS = {
    "head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96,
    "num_kv_shared_layers": 0,
    "intermediate_size": [48] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
UNCUTTABLE = {
    "gemma3n_text": (PER_LAYER_INPUTS, "Gemma3nForCausalLM"),
    "gptj": ({"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4}, "do not give hidden states alone"),
    "bert": ({"is_decoder": True}, "uses one weight as cls.predictions.bias and as"),
    "mixtral": ({"num_local_experts": 2, "output_router_logits": True}, "loss of its routers"),
}


@pytest.mark.parametrize("kind", UNCUTTABLE)
def test_a_model_between_whose_layers_more_passes_is_refused(
    save_model: Callable[..., Path], kind: str
) -> None:
    from transformers import AutoConfig

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    changes, reason = UNCUTTABLE[kind]
    config = AutoConfig.for_model(kind, **sizes | {"num_hidden_layers": 4} | changes)
    with pytest.raises(UnsupportedModel, match=reason):
        cut_causal_lm(save_model(config), 2)


@pytest.mark.parametrize("num_stages", [-1, 0, 5])
def test_there_are_1_stage_to_one_a_layer(folder_of: Callable[[str], Path], num_stages: int) -> None:
    with pytest.raises(UsageError, match="4 layers cannot be cut into .* Choose 1 to 4"):
        cut_causal_lm(folder_of("llama"), num_stages)


def test_a_cut_of_another_model_is_refused(folder_of: Callable[[str], Path]) -> None:
    cut = cut_causal_lm(folder_of("qwen3"), 2)[1]
    with pytest.raises(UsageError, match="does not hold the model that was cut"):
        load_stage(folder_of("llama"), cut)


def test_a_folder_that_is_not_there_or_quantised_is_refused(
    config_of: Callable[..., Any], save_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="There is no folder"):
        cut_causal_lm(tmp_path / "nowhere", 2)
    with pytest.raises(InputError, match="model.safetensors"):
        cut_causal_lm(tmp_path, 2)
    folder = save_model(config_of("llama"))
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1))
    with pytest.raises(UnsupportedModel, match="quantised by 'gptq'"):
        cut_causal_lm(folder, 2)


def test_values_of_another_kind_are_refused(folder_of: Callable[[str], Path]) -> None:
    first, last = stages_of(folder_of("llama"), 2)
    for values in (TOKENS.float(), TOKENS[0], torch.zeros(2, 8, 32)):
        with pytest.raises(InputError, match="takes token ids"):
            first(values)
    for values in (TOKENS, torch.zeros(2, 8, 31)):
        with pytest.raises(InputError, match=r"takes hidden states \[samples, tokens, 32\]"):
            last(values)
    for stage, values in ((first, torch.zeros(1, 65, dtype=torch.long)), (last, torch.zeros(1, 65, 32))):
        with pytest.raises(InputError, match="positions for 64 tokens, found 65"):
            stage(values)
