"""What a model hides from its tokens: the engine's attention hides the same, or the model is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capstan.errors import UnsupportedModel
from capstan.generation import Engine, Request
from capstan.models.attention_geometry import AttentionGeometry
from capstan.models.masks import geometry_by_mask

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Windows that the model states in its masks only.
WINDOWED = {
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    "qwen2_moe": EXPERTS
    | {
        "shared_expert_intermediate_size": 32,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
}
REFUSED = {
    "moshi": (
        {"sliding_window": 8, "head_dim": 16, "ffn_dim": 128},
        "Layer 0 of MoshiForCausalLM shows its tokens all positions, but generates from a cache of the",
    ),
    "doge": ({"sliding_window": 6}, "Layer 0 of DogeForCausalLM makes a mask of its own"),
    "gemma3_text": (
        {"head_dim": 16, "use_bidirectional_attention": True},
        r"Gemma3ForCausalLM (lets a token see what comes next|hides other positions)",
    ),
    "gemma3n_text": (
        {
            "head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 128,
            "num_kv_shared_layers": 0,
            "intermediate_size": [64] * 3,
            "activation_sparsity_pattern": [0.0] * 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "Gemma3nForCausalLM uses token ids for more than its input embedding",
    ),
    "llama4_text": (
        {"head_dim": 16, "intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": 8},
        "Llama4ForCausalLM",
    ),
}
GEOMETRY = AttentionGeometry(num_query_heads=4, num_key_heads=2, key_size=16, value_size=16, scaling=0.25)


def causal(_: Any, __: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return key <= query


def windowed(window: int) -> Any:
    return lambda batch, head, query, key: causal(batch, head, query, key) & (key > query - window)


@given(st.integers(1, 5000), st.integers(2, 4096))
def test_the_window_of_a_mask_is_found(window: int, longest: int) -> None:
    found = geometry_by_mask(GEOMETRY, windowed(window), longest, "M").sliding_window
    assert found == (window if window < longest else None)


@given(st.sampled_from([None, 3, 4096]), st.sampled_from([None, 100, 1 << 17]))
def test_a_window_that_the_mask_has_too_is_left_as_it_is(window: int | None, longest: int | None) -> None:
    rule = causal if window is None else windowed(window)
    stated = AttentionGeometry(
        num_query_heads=4, num_key_heads=2, key_size=16, value_size=16, scaling=0.25, sliding_window=window
    )
    assert geometry_by_mask(stated, rule, longest, "M") == stated


def test_a_window_that_only_the_geometry_has_is_none() -> None:
    # The mask decides in transformers; what is said beside it is for kernels that take no mask.
    stated = AttentionGeometry(
        num_query_heads=4, num_key_heads=2, key_size=16, value_size=16, scaling=0.25, sliding_window=8
    )
    assert geometry_by_mask(stated, causal, 64, "M").sliding_window is None


@pytest.mark.parametrize(
    "rule",
    [
        lambda _, __, query, key: causal(_, __, query, key) & (key // 16 == query // 16),
        lambda _, __, query, key: torch.ones_like(key <= query),
        lambda _, __, query, key: causal(_, __, query, key) | (key < 4),
        lambda _, __, query, key: windowed(32)(_, __, query, key) | (causal(_, __, query, key) & (key < 4)),
        lambda _, __, query, key: key < query,
    ],
    ids=[
        "chunks",
        "both directions",
        "a prefix in both directions",
        "attention to the first",
        "not to itself",
    ],
)
def test_what_no_window_says_is_refused(rule: Any) -> None:
    with pytest.raises(UnsupportedModel, match="M hides other positions from its tokens"):
        geometry_by_mask(GEOMETRY, rule, 4096, "M")


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_window_that_is_stated_in_the_mask_only_is_kept(
    kind: str,
    save_model: Callable[..., Path],
    open_engine: Callable[..., Engine],
    load_reference: Callable[[Path], Any],
) -> None:
    from transformers import AutoConfig

    folder = save_model(AutoConfig.for_model(kind, **SIZES | WINDOWED[kind]))
    prompt = torch.randint(1, 128, (21,), generator=torch.Generator().manual_seed(3)).tolist()
    with open_engine(folder) as engine:
        (done,) = engine.generate([Request(prompt=prompt, max_tokens=6)])
        windows = {layer.geometry.sliding_window for layer in engine.model.profile.layers}
    assert 6 in windows
    assert list(done.answers[0].tokens) == load_reference(folder).greedy(prompt, 6)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_would_be_answered_wrongly_is_refused_with_the_reason(
    kind: str, save_model: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    from transformers import AutoConfig

    changes, reason = REFUSED[kind]
    with pytest.raises(UnsupportedModel, match=reason):
        open_engine(save_model(AutoConfig.for_model(kind, **SIZES | changes)))


def test_whatever_a_models_code_raises_while_it_is_probed_is_told(
    model_folder: Callable[[str], Path],
    open_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    def forward(*_: Any, **__: Any) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM does not run in pieces.*no such thing"):
        open_engine(model_folder("llama"))
