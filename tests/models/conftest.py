"""Tiny random causal language models of several families, in Hugging Face format."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

VOCABULARY = 96
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_HEADED = _GROUPED | {"head_dim": 8}
_OPT = {key: size for key, size in _SIZES.items() if key != "intermediate_size"} | {
    "ffn_dim": 48,
    "dropout": 0.0,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# Name → the class of its config, and what makes it tiny. Windows are shorter than the samples.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _HEADED),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen2-tied": ("Qwen2Config", _GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", _HEADED),
    "mistral": ("MistralConfig", _HEADED | {"sliding_window": 3}),
    "gemma2": ("Gemma2Config", _HEADED | {"sliding_window": 3, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", _HEADED | {"sliding_window": 3, "query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2Config", _GPT2 | _NO_DROPOUT),
    "opt": ("OPTConfig", _OPT | {"word_embed_proj_dim": 32}),
    "opt-projected": ("OPTConfig", _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt-neox": ("GPTNeoXConfig", _SIZES),
    "phi3": ("Phi3Config", _GROUPED | {"original_max_position_embeddings": 64}),
    "mixtral": ("MixtralConfig", _HEADED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """The name of a family of models."""
    return request.param


@pytest.fixture(scope="session")
def config_of() -> Callable[..., Any]:
    """`config_of(family, **changes)`: the tiny config of a family; token 0 is its padding."""

    def config_of(name: str, **changes: Any) -> Any:
        import transformers

        class_name, sizes = FAMILIES[name]
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
        return getattr(transformers, class_name)(**sizes | tokens | changes)

    return config_of


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`save_model(config)`: a folder with a random model, in which nothing is left as initialised."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    def save_model(config: Any, *, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
        folder = tmp_path_factory.mktemp(config.model_type)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.to(dtype).save_pretrained(folder, **how)
        return folder

    return save_model


@pytest.fixture(scope="session")
def folder_of(config_of: Callable[..., Any], save_model: Callable[..., Path]) -> Callable[[str], Path]:
    """`folder_of(family)`: a folder with its tiny model, made once."""
    return cache(lambda name: save_model(config_of(name)))
