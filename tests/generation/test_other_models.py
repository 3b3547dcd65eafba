"""What a checkpoint holds, if not a causal language model, is said; what is one is opened, by any name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from capstan.errors import CapstanError
from capstan.generation import Engine, Request
from capstan.generation.model import open_model

KINDS = {
    "BertForMaskedLM": "BertForMaskedLM, a model for 'Masked LM', which does not go on with a text",
    "BertForSequenceClassification": "a model for 'Sequence Classification'",
    "BertLMHeadModel": "BertLMHeadModel lets a token see what comes next; give a decoder",
    "BertModel": "lacks 6 of the .*It was saved as BertModel",
    "DistilBertForQuestionAnswering": "a model for 'Question Answering'",
    "GPT2ForSequenceClassification": "GPT2ForSequenceClassification, a model for 'Sequence Classification'",
    "LlamaForTokenClassification": "a model for 'Token Classification'",
    "LlamaForQuestionAnswering": "a model for 'Question Answering'",
    "LlamaModel": "lacks 1 of the .*lm_head.weight.*It was saved as LlamaModel; give one that was saved with",
    "CLIPTextModel": "CLIPTextModel of type 'clip_text_model', of which transformers has no causal language",
    "T5EncoderModel": "T5EncoderModel of type 't5', of which transformers has no causal language model",
}
SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
OF_TYPE: dict[str, dict[str, Any]] = {
    "GPT2": {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "DistilBert": {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
    "T5": {"vocab_size": 100, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_model_that_does_not_predict_the_next_token_is_refused_as_what_it_is(
    name: str, open_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    import transformers

    kind = next(
        each for each in ("GPT2", "DistilBert", "Bert", "Llama", "CLIPText", "T5") if name.startswith(each)
    )
    config = getattr(transformers, f"{kind}Config")(**OF_TYPE.get(kind, SIZES))
    getattr(transformers, name)(config).save_pretrained(tmp_path)
    if "For" in name:
        (tmp_path / "model.safetensors").unlink()  # so it is before its weights are looked for
    with pytest.raises(CapstanError, match=KINDS[name]):
        open_engine(tmp_path)


@pytest.mark.parametrize("stated", [None, [], 5, "LlamaModel", [None], [["x"]], ["LLaMAForCausalLM"]])
def test_a_model_whose_config_says_nothing_of_its_class_is_opened(
    stated: Any, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": stated}))
    assert open_model(folder).num_layers == 3


def test_the_decoder_of_a_bert_whose_tied_bias_was_saved_once_answers_as_transformers(
    open_engine: Callable[..., Engine],
    open_reference: Callable[[Path], Any],
    answers_of: Callable[..., list[list[int]]],
    tmp_path: Path,
) -> None:
    from transformers import BertConfig, BertLMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = BertLMHeadModel(BertConfig(**SIZES, is_decoder=True))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(tmp_path)
    wanted = open_reference(tmp_path).greedy([5, 6, 7], 6)
    with open_engine(tmp_path) as engine:
        assert answers_of(engine, [Request(prompt=[5, 6, 7], max_tokens=6, ignore_eos=True)]) == [wanted]


def test_an_adapter_is_refused_as_what_it_is(tmp_path: Path, open_engine: Callable[..., Engine]) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CapstanError, match="holds an adapter, which only changes another model. Merge it"):
        open_engine(tmp_path)


def test_a_checkpoint_in_float64_is_computed_in_float32(
    model_folder: Callable[[str], Path],
    open_engine: Callable[..., Engine],
    open_reference: Callable[[Path], Any],
    answers_of: Callable[..., list[list[int]]],
    tmp_path: Path,
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})
    wanted = open_reference(model_folder("llama")).greedy([5, 6, 7], 6)
    for place in ("weights=device cache=device", "weights=disk cache=host attention=host"):
        with open_engine(folder, place=[place]) as engine:
            asked = [Request(prompt=[5, 6, 7], max_tokens=6, ignore_eos=True)]
            assert answers_of(engine, asked) == [wanted]


LLAMA_4 = SIZES | {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size_mlp": 48,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "no_rope_layers": [1, 0],
    "attn_temperature_tuning": False,
    "attention_chunk_size": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def test_a_llama_4_whose_context_is_one_chunk_answers_as_transformers(
    save_model: Callable[..., Path],
    open_engine: Callable[..., Engine],
    open_reference: Callable[[Path], Any],
    answers_of: Callable[..., list[list[int]]],
) -> None:
    from transformers import Llama4TextConfig

    folder = save_model(Llama4TextConfig(**LLAMA_4))
    prompts = [[5, 6, 7], list(range(1, 40)), [9, 8]]
    wanted = [open_reference(folder).greedy(prompt, 6) for prompt in prompts]
    asked = [Request(prompt=prompt, max_tokens=6, ignore_eos=True) for prompt in prompts]
    for place in ("weights=device cache=device", "weights=disk cache=host attention=host"):
        with open_engine(folder, place=[place]) as engine:
            assert answers_of(engine, asked) == wanted


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_chunk_size": 16}, "hides other positions .* attention in chunks"),
        ({"attn_temperature_tuning": True}, "Layer 1 of Llama4ForCausalLM numbers its tokens by itself"),
    ],
)
def test_a_llama_4_whose_answers_depend_on_more_is_refused_with_the_reason(
    changes: dict[str, Any], reason: str, save_model: Callable[..., Path]
) -> None:
    from transformers import Llama4TextConfig

    with pytest.raises(CapstanError, match=reason):
        open_model(save_model(Llama4TextConfig(**LLAMA_4 | changes)))
