"""Attention over packed sequences: prefill of whole prompts, decode of one token a sequence.

Query heads that share a key head are treated as extra queries of it (grouped-query attention without
repeating keys), so decode reads every cached byte once.

Keys of sequence b are rows 0 … length_b - 1 of its slot; row = position. A sliding window w lets position
i see positions i - w + 1 … i, as in transformers' masks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from capstan.models.attention_geometry import AttentionGeometry

# Torch's kernels for attention, without cuDNN's: that one is built anew, in some tenths of a second, whenever
# a shape is new.
FUSED_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# Scores of a softcapped or windowed prompt are computed for so many queries at a time that they take at
# most this much memory, however long the prompt.
_SCORE_BYTES = 32 << 20


def prefill_attention(query: Tensor, key: Tensor, value: Tensor, geometry: AttentionGeometry) -> Tensor:
    """Causal attention of a prompt's last tokens over all of it.

    query `[tokens, heads, size]`, key and value `[all tokens, key heads, size]` → `[tokens, heads, value
    size]`.
    """
    length = key.shape[0]
    if _is_fused(geometry, length, device_type=query.device.type, itemsize=query.dtype.itemsize):
        # (tokens, heads, size) -> (1, heads, tokens, size)
        output = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=None if len(query) == length else _last_queries_mask(len(query), length, query.device),
            is_causal=len(query) == length,
            scale=geometry.scaling,
            enable_gqa=geometry.queries_per_key > 1,
        )
        return output[0].transpose(0, 1)
    return _prefill_by_query_chunks(query, key, value, geometry)


def _last_queries_mask(num_queries: int, num_keys: int, device: torch.device) -> Any:
    """Causal, for queries that are the last of the keys' positions; on CUDA a promise that kernels know."""
    if device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler: seconds

        return causal_lower_right(num_queries, num_keys)
    return torch.ones(num_queries, num_keys, dtype=torch.bool).tril_(num_keys - num_queries)


def _is_fused(geometry: AttentionGeometry, length: int, *, device_type: str, itemsize: int) -> bool:
    """Whether torch has a kernel for this causal attention that needs no matrix of all scores."""
    window = geometry.sliding_window
    is_plain = geometry.softcap is None and (window is None or window >= length)
    has_kernel = geometry.key_size == geometry.value_size and (device_type == "cpu" or itemsize == 2)
    return is_plain and has_kernel


def _prefill_by_query_chunks(
    query: Tensor, key: Tensor, value: Tensor, geometry: AttentionGeometry
) -> Tensor:
    length, num_key_heads = key.shape[0], geometry.num_key_heads
    before = length - len(query)
    step = max(1, _SCORE_BYTES // (4 * geometry.num_query_heads * length))
    output = query.new_empty(len(query), geometry.num_query_heads, geometry.value_size)
    positions = torch.arange(length, device=query.device)
    for start in range(before, length, step):
        end = min(start + step, length)
        visible = positions[None, :end] <= positions[start:end, None]
        if geometry.sliding_window is not None:
            visible &= positions[None, :end] > positions[start:end, None] - geometry.sliding_window
        # (queries, heads, size) -> (key heads, group x queries, size): one product for each key head
        grouped = (
            query[start - before : end - before]
            .unflatten(1, (num_key_heads, -1))
            .permute(1, 2, 0, 3)
            .flatten(1, 2)
        )
        scores = grouped @ key[:end].permute(1, 2, 0)
        weights = _softmax(scores.unflatten(1, (-1, end - start)), visible, geometry)
        mixed = weights.flatten(1, 2) @ value[:end].transpose(0, 1)
        output[start - before : end - before] = (
            mixed.unflatten(1, (-1, end - start)).permute(2, 0, 1, 3).flatten(1, 2)
        )
    return output


def workspace_bytes(
    geometry: AttentionGeometry,
    *,
    longest_prompt: int,
    num_decoding: int,
    num_rows: int,
    itemsize: int,
    device_type: str,
) -> int:
    """Upper bound of what one call of either function allocates, its result included.

    Prefill: the packed result, a copy of the queries, and the normaliser of each query; without a fused
    kernel also four blocks of scores of `_SCORE_BYTES` (or of one query). Decode: four blocks of scores in
    float32, and the result.
    """
    width = geometry.num_query_heads * max(geometry.key_size, geometry.value_size)
    one_query = 4 * geometry.num_query_heads * longest_prompt
    prefill = 2 * longest_prompt * width * itemsize + one_query
    if not _is_fused(geometry, longest_prompt, device_type=device_type, itemsize=itemsize):
        prefill += 4 * max(one_query, min(_SCORE_BYTES, one_query * longest_prompt))
    decode = 4 * 4 * num_decoding * geometry.num_query_heads * num_rows + 2 * num_decoding * width * itemsize
    return max(prefill, decode)


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, geometry: AttentionGeometry
) -> Tensor:
    """Attention of one new token of each sequence over its cached rows, its own row included.

    query `[sequences, heads, size]`; keys `[sequences, rows, key heads, size]`, values alike; `visible` is
    what `visible_rows` says. Returns `[sequences, heads, value size]`.
    """
    grouped = query.unflatten(1, (geometry.num_key_heads, -1))  # (sequences, key heads, group, size)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)  # (sequences, key heads, rows, size)
    if geometry.softcap is None:
        output = F.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=visible, scale=geometry.scaling
        )
    else:
        output = _softmax(grouped @ keys.transpose(2, 3), visible, geometry) @ values
    return output.flatten(1, 2)


def visible_rows(ends: Tensor, num_rows: int, window: int | None) -> Tensor:
    """Which of `num_rows` rows the last token of each sequence sees, when sequence b has `ends[b]` of them.

    ends: `[sequences]`, on the host. Returns a mask `[sequences, 1, 1, rows]`.
    """
    rows = torch.arange(num_rows)[None]
    visible = rows < ends[:, None]
    if window is not None:
        visible &= rows >= ends[:, None] - window
    return visible[:, None, None]


def _softmax(scores: Tensor, visible: Tensor | None, geometry: AttentionGeometry) -> Tensor:
    scores.mul_(geometry.scaling)
    if geometry.softcap is not None:
        scores.div_(geometry.softcap).tanh_().mul_(geometry.softcap)
    if visible is not None:
        scores.masked_fill_(~visible, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
