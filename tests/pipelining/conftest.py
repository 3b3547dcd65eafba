"""Tiny random causal language models in Hugging Face format, some with a tokenizer of bytes."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import made_tokenizers
from world import Forked, WarmParent

VOCABULARY, HIDDEN = 48, 16
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
BYTES = 258  # made_tokenizers.byte_level has one for each, and two special ones
_TEXTS = SIZES | {"vocab_size": BYTES, "max_position_embeddings": 32}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES),
    "llama-tied": ("LlamaConfig", _TEXTS | {"tie_word_embeddings": True}),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": BYTES,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "eos_token_id": None,
            "bos_token_id": None,
        },
    ),
    "gemma2-tied": ("Gemma2Config", SIZES | {"head_dim": 8, "sliding_window": 3}),
}


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folder_of(kind)`: its folder, made once."""
    import transformers

    transformers.utils.logging.disable_progress_bar()

    @cache
    def folder_of(kind: str) -> Path:
        folder, (class_name, sizes) = tmp_path_factory.mktemp(kind), CONFIGS[kind]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            config = getattr(transformers, class_name)(**sizes)
            transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        if config.vocab_size == BYTES:
            made_tokenizers.byte_level(words=()).save_pretrained(folder)
        return folder

    return folder_of


@pytest.fixture
def start(warm_parent: WarmParent) -> Iterator[Callable[..., Forked]]:
    """`start(file, function, *arguments, environment=…)`: a process that calls the function and then just
    stops, which is quicker than to end as a program does. Killed when the test is over."""
    started: list[Forked] = []

    def start(file: str, function: str, *arguments: Any, environment: Mapping[str, str]) -> Forked:
        started.append(warm_parent.fork(file, function, arguments, environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(60)
