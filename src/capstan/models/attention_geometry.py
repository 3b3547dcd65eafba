"""What a layer asks of its attention, read from one call of it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from capstan.errors import UnsupportedModel

_HARMLESS_OPTIONS = frozenset(
    {
        "cache_position",
        "dropout",
        "is_causal",
        "output_attentions",
        "position_embeddings",
        "position_ids",
        "use_cache",
        "output_router_logits",
    }
)


@dataclass(frozen=True, kw_only=True)
class AttentionGeometry:
    """The shape and rules of one layer's attention, as its own forward asks for it."""

    num_query_heads: int
    num_key_heads: int
    key_size: int
    value_size: int
    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None

    @property
    def cached_elements(self) -> int:
        """Elements of keys and values that one token leaves in the cache."""
        return self.num_key_heads * (self.key_size + self.value_size)

    @property
    def queries_per_key(self) -> int:
        return self.num_query_heads // self.num_key_heads


def attend_through_module(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The function registered with transformers: hands the call to the engine that owns the module.

    query `[1, heads, tokens, size]`, key and value `[1, key heads, tokens, size]`, unrepeated; returns
    `[1, tokens, heads, value size]`. A mask is handed on where there is one: while the model is probed.
    """
    if attention_mask is not None:
        options["attention_mask"] = attention_mask
    return module.capstan_attend(module, query, key, value, **options), None


def geometry_of(
    query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], model: str
) -> AttentionGeometry:
    """Read a layer's geometry from one call of its attention.

    Raises:
        UnsupportedModel: the layer asks for something that this attention does not do.
    """
    known = {"scaling", "sliding_window", "softcap"}
    for name, option in options.items():
        if option is not None and name not in known | _HARMLESS_OPTIONS:
            raise UnsupportedModel(f"{model} asks its attention for {name!r}, which this engine does not do.")
    return AttentionGeometry(
        num_query_heads=query.shape[1],
        num_key_heads=key.shape[1],
        key_size=key.shape[3],
        value_size=value.shape[3],
        scaling=float(options.get("scaling") or key.shape[3] ** -0.5),
        sliding_window=options.get("sliding_window"),
        softcap=options.get("softcap"),
    )
