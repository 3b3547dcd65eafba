"""Attention over packed sequences and over rows of the KV cache, on the device and on the host."""

from capstan.generation.attention.packed import AttentionGeometry, decode_attention, prefill_attention

__all__ = ["AttentionGeometry", "decode_attention", "prefill_attention"]
