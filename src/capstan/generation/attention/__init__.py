"""Attention over packed sequences and over rows of the KV cache, on the device and on the host."""

from capstan.generation.attention.packed import decode_attention, prefill_attention
from capstan.models.attention_geometry import AttentionGeometry

__all__ = ["AttentionGeometry", "decode_attention", "prefill_attention"]
