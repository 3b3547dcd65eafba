"""Models, prompts and budgets that cannot be run are refused, with what was found and what to do."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from capstan.errors import DeviceError, DoesNotFit, InputError, UnsupportedModel, UsageError
from capstan.generation import Engine, Request, plan_for
from capstan.generation.planning.batching import Length
from capstan.hardware import Machine


@pytest.fixture
def folder(model_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny Llama to be damaged."""
    return shutil.copytree(model_folder("llama"), tmp_path / "model")


def _change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- what is not a model, or not all of one --------------------------------------------------------------


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path, open_engine: Callable[..., Engine]) -> None:
    with pytest.raises(InputError, match="There is no folder .*nowhere. Name a folder with a model"):
        open_engine(tmp_path / "nowhere")


def test_a_folder_without_weights_says_what_it_has(folder: Path, open_engine: Callable[..., Engine]) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has neither model.safetensors nor .*found: .*config.json"):
        open_engine(folder)


def test_a_folder_without_a_config_says_so(folder: Path, open_engine: Callable[..., Engine]) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="has no config.json. Name a folder in Hugging Face format"):
        open_engine(folder)


def test_a_sharded_checkpoint_answers_like_one_file_and_names_a_shard_that_is_missing(
    requests: list[Request],
    expected: Callable[[str], list[list[int]]],
    family_config: Callable[..., Any],
    save_model: Callable[..., Path],
    open_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
) -> None:
    sharded = save_model(family_config("llama"), max_shard_size="200KB")
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    with open_engine(sharded, place=["weights=disk cache=device"]) as engine:
        assert answers_of(engine, requests) == expected("llama")
    shards[1].unlink()
    with pytest.raises(
        InputError, match=rf"lacks 1 of the {len(shards)} shards .*{shards[1].name}. Download"
    ):
        open_engine(sharded)


def test_a_truncated_file_is_refused_before_anything_is_computed(
    folder: Path, open_engine: Callable[..., Engine]
) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(
        InputError, match="model.safetensors is truncated: .* ends at byte .* Download it again"
    ):
        open_engine(folder)


@pytest.mark.parametrize(
    "garbage", [b"not a model at all, whatever it says", struct.pack("<Q", 20) + b"{" * 40]
)
def test_a_file_of_garbage_is_refused(
    garbage: bytes, folder: Path, open_engine: Callable[..., Engine]
) -> None:
    (folder / "model.safetensors").write_bytes(garbage)
    with pytest.raises(InputError, match=r"model\.safetensors .*(not a safetensors file|damaged header)"):
        open_engine(folder)


@pytest.mark.parametrize("text", ["{", "3", '{"added_tokens": [], "model": {"type": "x"}}'])
def test_a_damaged_tokenizer_is_named(text: str, folder: Path, open_engine: Callable[..., Engine]) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match=f"The tokenizer in {folder} cannot be read"):
        open_engine(folder)


def test_weights_of_another_shape_than_the_config_says_are_refused_with_both_shapes(
    folder: Path, open_engine: Callable[..., Engine]
) -> None:
    _change_config(folder, intermediate_size=112)
    with pytest.raises(
        InputError, match=r"'model.layers.0.mlp.\w+.weight' should have shape .*112.* of shape"
    ):
        open_engine(folder)


def test_an_element_count_alone_does_not_make_a_shape(
    folder: Path, open_engine: Callable[..., Engine]
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    _rewrite(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    with pytest.raises(InputError, match=rf"'{name}' should have shape \[96, 64\]; .*\[64, 96\]"):
        open_engine(folder)


def test_missing_tensors_are_counted_and_named(folder: Path, open_engine: Callable[..., Engine]) -> None:
    _rewrite(folder, lambda tensors: tensors.pop("model.layers.2.self_attn.q_proj.weight"))
    with pytest.raises(
        InputError, match=r"lacks 1 of the 30 tensors of LlamaForCausalLM: model.layers.2.self_attn"
    ):
        open_engine(folder)


# --- what is a model, but not one for this engine --------------------------------------------------------


def test_an_unknown_architecture_is_named(folder: Path, open_engine: Callable[..., Engine]) -> None:
    _change_config(folder, model_type="nonsense", architectures=["NonsenseForCausalLM"])
    with pytest.raises(UnsupportedModel, match="transformers does not know the model in .*nonsense"):
        open_engine(folder)


def test_an_encoder_decoder_is_refused(folder: Path, open_engine: Callable[..., Engine]) -> None:
    from transformers import T5Config

    T5Config(vocab_size=128, d_model=64).save_pretrained(folder)
    with pytest.raises(UnsupportedModel, match="'t5' in .* is an encoder-decoder; give a decoder-only model"):
        open_engine(folder)


@pytest.mark.parametrize(
    ("class_name", "settings"),
    [
        ("BloomConfig", {"n_layer": 2, "n_head": 4}),
        ("FalconConfig", {"num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}),
        ("GPTJConfig", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
        ("MptConfig", {"d_model": 64, "n_layers": 2, "n_heads": 4}),
        ("MambaConfig", {"num_hidden_layers": 2}),
    ],
)
def test_a_model_whose_attention_cannot_be_taken_over_is_refused(
    class_name: str,
    settings: dict[str, Any],
    save_model: Callable[..., Path],
    open_engine: Callable[..., Engine],
) -> None:
    import transformers

    sizes = {"hidden_size": 64} if "n_embd" not in settings and "d_model" not in settings else {}
    config = getattr(transformers, class_name)(vocab_size=128, **sizes, **settings)
    with pytest.raises(UnsupportedModel, match=r"transformers' attention interface|for this engine"):
        open_engine(save_model(config))


def test_a_model_that_sees_what_comes_next_is_refused(
    save_model: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    from transformers import ElectraConfig

    config = ElectraConfig(
        vocab_size=128,
        embedding_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        is_decoder=False,
    )
    with pytest.raises(UnsupportedModel, match="Electra"):
        open_engine(save_model(config))


def test_attention_with_sinks_is_refused_by_the_name_of_what_it_asks_for(
    save_model: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    from transformers import GptOssConfig

    config = GptOssConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
    )
    with pytest.raises(UnsupportedModel, match="GptOssForCausalLM asks its attention for 's_aux'"):
        open_engine(save_model(config))


# --- what is asked -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(prompt=[]), "The prompt is empty; a prompt needs at least one token"),
        (Request(prompt=[3, 128]), "token ids outside 0 … 127, the model's vocabulary"),
        (Request(prompt=[-1]), "token ids outside 0 … 127, the model's vocabulary"),
        (Request(prompt="text"), "has no tokenizer; give prompts as lists of token ids"),
        (
            Request(prompt=[1] * 300, max_tokens=8),
            "A prompt of 300 tokens and 8 new ones exceed the model's context of 256. Shorten the prompt",
        ),
        (Request(prompt=[1] * 200, max_tokens=57), "200 tokens and 57 new ones exceed"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused_before_anything_runs(
    request_: Request, message: str, model_folder: Callable[[str], Path], open_engine: Callable[..., Engine]
) -> None:
    with open_engine(model_folder("llama")) as engine:
        with pytest.raises(InputError, match=message):
            next(engine.generate([Request(prompt=[1], max_tokens=1), request_]))
        assert engine.trace is None, "nothing ran"
        assert len(list(engine.generate([Request(prompt=[1], max_tokens=1)]))) == 1


def test_a_text_to_score_may_fill_the_context_but_not_exceed_it(
    model_folder: Callable[[str], Path], open_engine: Callable[..., Engine]
) -> None:
    with open_engine(model_folder("llama")) as engine:
        assert len(engine.score([[1] * 256])[0].logprobs) == 255
        with pytest.raises(InputError, match="A prompt of 257 tokens .* context of 256"):
            engine.score([[1] * 257])


def test_a_request_may_fill_the_context_to_its_last_token(
    model_folder: Callable[[str], Path],
    open_engine: Callable[..., Engine],
    open_reference: Callable[[Path], Any],
    answers_of: Callable[..., list[list[int]]],
) -> None:
    for family in ("opt", "gpt2"):  # their positions are a table of that length
        folder = model_folder(family)
        prompt = [1 + index % 120 for index in range(253)]
        with open_engine(folder) as engine:
            answers = answers_of(engine, [Request(prompt=prompt, max_tokens=3)])
        assert answers == [open_reference(folder).greedy(prompt, 3)]


# --- what is granted ---------------------------------------------------------------------------------------


def test_a_device_too_small_for_one_layer_is_told_what_it_would_need(
    model_folder: Callable[[str], Path], open_engine: Callable[..., Engine]
) -> None:
    with pytest.raises(
        DoesNotFit, match=r"The device needs .* was granted 100\.00 KiB \(.*workspace .*--device-memory"
    ):
        open_engine(model_folder("llama"), device_memory="100KiB")


def test_a_host_too_small_for_what_must_lie_there_is_told_what_it_would_need(
    model_folder: Callable[[str], Path], open_engine: Callable[..., Engine]
) -> None:
    with pytest.raises(
        DoesNotFit, match=r"The host needs .* was granted 10\.00 KiB \(weights at rest .*--host-memory"
    ):
        open_engine(model_folder("llama"), host_memory="10KiB", place=["weights=host"])


@pytest.mark.parametrize("place", ["cache=disk", "activations=disk"])
def test_a_disk_that_was_not_granted_is_asked_for_by_the_name_of_its_option(
    place: str, model_folder: Callable[[str], Path], open_engine: Callable[..., Engine]
) -> None:
    with pytest.raises(DoesNotFit, match=r"--disk(?!-memory)") as caught:
        open_engine(model_folder("llama"), disk=None, place=[place])
    assert "--disk-memory" not in str(caught.value), "there is no such option"


def test_a_job_that_does_not_fit_is_refused_and_a_smaller_one_runs(
    model_folder: Callable[[str], Path], open_engine: Callable[..., Engine]
) -> None:
    sizes = {"device_memory": "800KiB", "host_memory": "1MiB", "disk": None}
    with open_engine(model_folder("llama"), lengths=[Length(prompt=4, new=2)], **sizes) as engine:
        with pytest.raises(DoesNotFit, match="The device needs .* or shorten prompts and max_tokens"):
            list(engine.generate([Request(prompt=[1] * 250, max_tokens=2)]))
        assert len(list(engine.generate([Request(prompt=[1] * 4, max_tokens=2)]))) == 1


@pytest.mark.parametrize("size", ["much", "10 parsecs", "-1GiB"])
def test_a_size_that_cannot_be_read_is_refused(
    size: str, model_folder: Callable[[str], Path], open_engine: Callable[..., Engine]
) -> None:
    with pytest.raises(UsageError, match="is not a size; write for example 64MiB"):
        open_engine(model_folder("llama"), device_memory=size)


def test_a_device_that_is_not_there_is_refused(
    model_folder: Callable[[str], Path], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="torch sees no CUDA device. Use --device cpu"):
        plan_for(model_folder("llama"), machine=machine, device="cuda")
    with pytest.raises(UsageError, match="The device is 'cuda', 'cpu' or 'auto', not 'tpu'"):
        plan_for(model_folder("llama"), machine=machine, device="tpu")


# --- checkpoints that say one thing and hold another -------------------------------------------------------


@pytest.fixture
def tied(family_config: Callable[..., Any], save_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny Llama whose output matrix is its table, to be changed."""
    return shutil.copytree(
        save_model(family_config("llama", tie_word_embeddings=True)), tmp_path / "tied-model"
    )


_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _own_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[_HEAD] = tensors[_TABLE].flip(0).contiguous()


def _nearly_equal_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[_HEAD] = tensors[_TABLE].clone()
    tensors[_HEAD][-1] *= -4


def _equal_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[_HEAD] = tensors[_TABLE].clone()


def _only_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[_HEAD] = tensors.pop(_TABLE)


@pytest.mark.parametrize(
    ("change", "is_tied"),
    [(_own_head, False), (_nearly_equal_head, False), (_equal_head, True), (_only_head, True)],
)
def test_what_the_checkpoint_holds_decides_whether_a_model_is_tied(
    change: Callable[[dict[str, torch.Tensor]], None],
    is_tied: bool,
    tied: Path,
    requests: list[Request],
    open_engine: Callable[..., Engine],
    load_reference: Callable[[Path], Any],
    answers_of: Callable[..., list[list[int]]],
) -> None:
    _rewrite(tied, change)
    reference = load_reference(tied)
    with open_engine(tied) as engine:
        assert engine.model.meta_model.is_tied == is_tied
        answers = answers_of(engine, requests)
    assert answers == [reference.greedy(request.prompt, request.max_tokens) for request in requests]


@pytest.mark.parametrize(
    ("stated", "method"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"bits": 4}, "unknown"),
    ],
)
@pytest.mark.parametrize("name", ["quantization_config", "compression_config"])
def test_a_quantised_checkpoint_is_refused_by_the_name_of_its_method(
    name: str, stated: dict[str, Any], method: str, folder: Path, open_engine: Callable[..., Engine]
) -> None:
    _change_config(folder, **{name: stated})
    with pytest.raises(UnsupportedModel, match=f"quantised by '{method}' .{name} in its config.json"):
        open_engine(folder)


def test_a_generation_config_that_cannot_be_read_is_named(
    folder: Path, open_engine: Callable[..., Engine]
) -> None:
    (folder / "generation_config.json").write_text("{bad")
    with pytest.raises(InputError, match=r"generation_config.json, which says where answers end"):
        open_engine(folder)


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_token_zero_can_end_an_answer(where: str, folder: Path, open_engine: Callable[..., Engine]) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    _change_config(folder, eos_token_id=0 if where == "config.json" else 5)
    if where == "generation_config.json":
        (folder / where).write_text(json.dumps({"eos_token_id": 0}))
    with open_engine(folder) as engine:
        assert engine.model.stop_tokens == {0}


def test_an_attention_chosen_from_a_list_of_the_models_own_is_refused_for_that(
    folder: Path, open_engine: Callable[..., Engine]
) -> None:
    from transformers import FalconConfig

    FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2).save_pretrained(folder)
    with pytest.raises(UnsupportedModel, match="'falcon' .*does not go through transformers' attention"):
        open_engine(folder)
