"""Attention of decoding sequences over rows that rest in host memory, without moving or converting them.

host_attention.c reads the rows once, as they are stored, at the rate of the memory, and computes in float32.
Where it cannot be compiled, or for heads whose size it does not do, torch does the work by way of decoded
copies: the same result to rounding, several times slower.
"""

import ctypes
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capstan.codecs import Cast, GroupQuantised, Identity
from capstan.errors import DoesNotFit
from capstan.generation.attention.packed import decode_attention, visible_rows
from capstan.generation.attention.row_format import RowFormat
from capstan.hardware.compiler import compiled

_SOURCE = Path(__file__).with_suffix(".c")
_PLAIN_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_GROUPED_KINDS = {8: 3, 4: 4}
_LANES = 16
# What the rate is measured on: more than caches hold.
_SAMPLE_SLOTS = 32
_SAMPLE_BYTES = 192 << 20
_MOST_QUERIES = 8


class _Call(ctypes.Structure):
    """`Call` of host_attention.c."""

    _fields_ = (
        ("prefix", ctypes.c_void_p),
        ("region", ctypes.c_void_p),
        ("news", ctypes.c_void_p),
        ("queries", ctypes.c_void_p),
        ("outputs", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("slot_bytes", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("sequences", ctypes.c_int32),
        ("key_heads", ctypes.c_int32),
        ("prefix_rows", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


@dataclass(frozen=True, kw_only=True)
class Seats:
    """Where a chunk's sequences sit in a region, and how many rows they have: int32 `[sequences]`."""

    slots: Tensor
    ends: Tensor

    @classmethod
    def of(cls, slots: list[int], ends: list[int]) -> "Seats":
        return cls(slots=torch.tensor(slots, dtype=torch.int32), ends=torch.tensor(ends, dtype=torch.int32))


def attend_on_host(
    query: Tensor,
    region: Tensor,
    layout: RowFormat,
    seats: Seats,
    *,
    out: Tensor,
    prefix: Tensor | None = None,
    new_rows: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """Attend one new token of each sequence over its rows.

    Args:
        query: `[sequences, heads, key size]`, contiguous.
        region: uint8 `[slots, capacity, row bytes]`, each sequence's rows one after the other in its slot.
        out: `[sequences, heads, value size]`, contiguous, of the query's dtype.
        prefix: uint8 `[rows, row bytes]`, rows that every sequence has before those in its slot.
        new_rows: uint8 `[sequences, row bytes]`, each sequence's last row, to be put into its slot first.
        threads: how many processors to use; by default as many as torch does.
    """
    kernel = _kernel(layout, query.dtype) if _lies_simply(region) else None
    if kernel is None:
        _attend_decoded(query, region, layout, seats, out, prefix, new_rows)
        return
    geometry = layout.geometry
    starts = torch.zeros_like(seats.ends)
    if geometry.sliding_window is not None:
        starts = (seats.ends - geometry.sliding_window).clamp_(min=0)
    call = _Call(
        prefix=None if prefix is None else prefix.data_ptr(),
        region=region.data_ptr(),
        news=None if new_rows is None else new_rows.data_ptr(),
        queries=query.data_ptr(),
        outputs=out.data_ptr(),
        slots=seats.slots.data_ptr(),
        starts=starts.data_ptr(),
        ends=seats.ends.data_ptr(),
        slot_bytes=region.stride(0),
        row_bytes=layout.row_bytes,
        sequences=len(seats.slots),
        key_heads=geometry.num_key_heads,
        prefix_rows=0 if prefix is None else len(prefix),
        threads=threads or torch.get_num_threads(),
        scaling=geometry.scaling,
        softcap=geometry.softcap or 0.0,
    )
    if kernel(ctypes.byref(call)):
        raise DoesNotFit("The host has no memory left for attention. Lower --host-memory.")


def reads_in_place(layout: RowFormat, query_dtype: torch.dtype) -> bool:
    """Whether rows of this format are attended as they lie; otherwise decoded copies are made."""
    return _kernel(layout, query_dtype) is not None


def scratch_bytes(layout: RowFormat, *, slots: int, rows: int) -> int:
    """Upper bound of the host memory that attending `slots` sequences of `rows` rows takes for itself."""
    geometry = layout.geometry
    sizes = geometry.key_size + geometry.value_size
    if reads_in_place(layout, layout.dtype):
        return torch.get_num_threads() * 4 * geometry.num_query_heads * (sizes + rows + _LANES)
    scores = 4 * 4 * geometry.num_query_heads * rows
    return layout.decoded_bytes(rows) + 2 * rows * layout.row_bytes + scores + 64 * slots


@cache
def reading_rate(layout: RowFormat) -> float:
    """Bytes of rows that this machine attends in a second, measured in some hundredths of one."""
    num_rows = max(16, _SAMPLE_BYTES // (_SAMPLE_SLOTS * layout.row_bytes))
    region = torch.zeros(_SAMPLE_SLOTS, num_rows, layout.row_bytes, dtype=torch.uint8)
    geometry = layout.geometry
    heads = (_SAMPLE_SLOTS, geometry.num_query_heads)
    query = torch.zeros(*heads, geometry.key_size, dtype=layout.dtype)
    out = torch.empty(*heads, geometry.value_size, dtype=layout.dtype)
    seats = Seats.of(list(range(_SAMPLE_SLOTS)), [num_rows] * _SAMPLE_SLOTS)
    seconds = []
    for _ in range(4):
        started_s = time.perf_counter()
        attend_on_host(query, region, layout, seats, out=out)
        seconds.append(time.perf_counter() - started_s)
    return region.numel() / min(seconds)


def _lies_simply(region: Tensor) -> bool:
    return region.stride(2) == 1 and region.stride(1) == region.shape[2]


@cache
def _kernel(layout: RowFormat, query_dtype: torch.dtype) -> Any:
    geometry, codec = layout.geometry, layout.codec
    if isinstance(codec, GroupQuantised):
        kind = _GROUPED_KINDS.get(codec.num_bits)
        is_usual = not codec.symmetric and codec.scale_dtype == torch.float16 and codec.dim == -1
        group_size = codec.group_size
        sizes_fit = is_usual and group_size % _LANES == 0
    else:
        stored = codec.dtype if isinstance(codec, Cast) else layout.dtype
        kind = _PLAIN_KINDS.get(stored) if isinstance(codec, (Cast, Identity)) else None
        group_size, sizes_fit = _LANES, True
    sizes_fit = sizes_fit and not (geometry.key_size % group_size or geometry.value_size % group_size)
    if kind is None or not sizes_fit or query_dtype not in _PLAIN_KINDS:
        return None
    defines = {
        "KIND": kind,
        "QUERY_KIND": _PLAIN_KINDS[query_dtype],
        "PER_KEY": geometry.queries_per_key,
        "QUERIES": max(n for n in range(1, _MOST_QUERIES + 1) if geometry.queries_per_key % n == 0),
        "KEY_SIZE": geometry.key_size,
        "VALUE_SIZE": geometry.value_size,
        "GROUP_SIZE": group_size,
    }
    library = compiled(_SOURCE, defines)
    return None if library is None else library.capstan_attend


def _attend_decoded(
    query: Tensor,
    region: Tensor,
    layout: RowFormat,
    seats: Seats,
    out: Tensor,
    prefix: Tensor | None,
    new_rows: Tensor | None,
) -> None:
    """By way of decoded copies, one sequence at a time so that they stay small."""
    shared = 0 if prefix is None else len(prefix)
    for index, (slot, end) in enumerate(zip(seats.slots.tolist(), seats.ends.tolist(), strict=True)):
        rows = region[slot, : end - shared]
        if new_rows is not None:
            rows[-1] = new_rows[index]
        if prefix is not None:
            rows = torch.cat((prefix, rows))
        keys, values = layout.decode(rows[None])
        window = layout.geometry.sliding_window
        visible = None if window is None else visible_rows(torch.tensor([end]), end, window)
        out[index] = decode_attention(query[index : index + 1], keys, values, visible, layout.geometry)[0]
