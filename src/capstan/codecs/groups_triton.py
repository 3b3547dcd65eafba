"""Group quantisation in one pass over a CUDA device's memory: the bits of the torch path, sooner.

Importing this module imports Triton, so `groups` imports it when a tensor on such a device first asks.

The kernels repeat `grid` and `bits` operation by operation, each an IEEE operation that rounds to nearest. So
they are launched without fused multiply-adds and divide by `div_rn`: Triton's own division is approximate.
A record may begin at any byte, so stored numbers are put together from bytes.
"""

import logging
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from capstan.codecs.bits import packed_bytes
from capstan.codecs.grid import LARGEST, LARGEST_LEVEL, Grid

logger = logging.getLogger(__name__)


class _Number(NamedTuple):
    """A type of numbers: Triton's name, the integers that hold its bits, and two of its numbers as bits."""

    dtype: Any
    integers: Any
    largest: int
    nan: int


_NUMBERS = {
    torch.float32: _Number(tl.float32, tl.int32, 0x7F7FFFFF, 0x7FC00000),
    torch.float16: _Number(tl.float16, tl.int16, 0x7BFF, 0x7E00),
    torch.bfloat16: _Number(tl.bfloat16, tl.int16, 0x7F7F, 0x7FC0),
}
_NUM_BITS = (2, 4, 8)
_GROUP_SIZES = (16, 32, 64, 128)  # powers of two, as every size of a block is

_BLOCK_ELEMENTS = 4096  # of one program: 32 for each of its threads

# From here on float32's numbers are 1 apart. So a sum with this is rounded to the nearest integer, ties to
# even, which is in its lowest bits.
_ROUNDER = tl.constexpr(1.5 * 2**23)


def run_on(device: torch.device) -> bool:
    """Whether kernels can be built for this CUDA device, found by building one.

    Before compute capability 8.0 there is no conversion to bfloat16. A machine may lack the C compiler that
    Triton builds launchers with; that is logged and no error, since the torch path needs none.
    """
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    grid = Grid(num_bits=8, symmetric=True, dtype=torch.float16)
    payload = torch.zeros(18, dtype=torch.uint8, device=device)
    out = torch.empty(16, device=device)
    try:
        decode(grid, 16, payload, out)
    except Exception as error:  # each step of a build has errors of its own
        logger.warning("Triton cannot build kernels here, so group quantisation is slower: %s", error)
        return False
    return True


def cover(grid: Grid, group_size: int, rows: Tensor) -> bool:
    """Whether these kernels encode and decode such rows: whole groups, one after the other in memory."""
    return (
        grid.num_bits in _NUM_BITS
        and group_size in _GROUP_SIZES
        and rows.dtype in _NUMBERS
        and rows.dim() > 0
        and rows.shape[-1] % group_size == 0
        and rows.is_contiguous()
        and rows.numel() > 0
    )


def encode(grid: Grid, group_size: int, rows: Tensor, payload: Tensor) -> None:
    """Write the record of every group of `rows`, rounded to the nearest level; a group not finite is NaN."""
    number = _NUMBERS[grid.dtype]
    _launch(
        _encode,
        grid,
        group_size,
        rows,
        payload,
        HIGHEST=float(grid.highest),
        LEAST=-min(torch.finfo(grid.dtype).max, LARGEST),
        LARGEST=LARGEST,
        LARGEST_STEP=number.largest,
        NAN=number.nan,
    )


def decode(grid: Grid, group_size: int, payload: Tensor, rows: Tensor) -> None:
    """Write the value of every code of a payload into `rows`, saturated where their type is too narrow."""
    limit = torch.finfo(rows.dtype).max
    _launch(_decode, grid, group_size, rows, payload, LIMIT=limit if limit < LARGEST_LEVEL else None)


def _launch(kernel: Any, grid: Grid, group_size: int, rows: Tensor, payload: Tensor, **more: Any) -> None:
    num_groups, groups_each = rows.numel() // group_size, _BLOCK_ELEMENTS // group_size
    with torch.cuda.device_of(rows):
        kernel[(triton.cdiv(num_groups, groups_each),)](
            rows,
            payload,
            num_groups,
            GROUPS=groups_each,
            GROUP_SIZE=group_size,
            GROUP_BYTES=payload.numel() // num_groups,
            CODE_BYTES=packed_bytes(group_size, grid.num_bits),
            NUM_BITS=grid.num_bits,
            SYMMETRIC=grid.symmetric,
            LOWEST=float(grid.lowest),
            DTYPE=_NUMBERS[grid.dtype].dtype,
            INTEGERS=_NUMBERS[grid.dtype].integers,
            **more,
            enable_fp_fusion=False,
        )


@triton.jit(do_not_specialize=["num_groups"])
def _encode(
    rows,
    payload,
    num_groups,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    NUM_BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    LOWEST: tl.constexpr,
    DTYPE: tl.constexpr,
    INTEGERS: tl.constexpr,
    HIGHEST: tl.constexpr,
    LEAST: tl.constexpr,
    LARGEST: tl.constexpr,
    LARGEST_STEP: tl.constexpr,
    NAN: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * GROUPS
    groups = tl.arange(0, GROUPS)
    is_group = groups < num_groups - first
    places = groups[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    values = tl.load(rows + first * GROUP_SIZE + places, is_group[:, None], 0.0).to(tl.float32)
    records = payload + first * GROUP_BYTES + groups * GROUP_BYTES
    numbers = records + CODE_BYTES

    low = tl.reduce(values, 1, _smaller) + 0.0
    high = tl.reduce(values, 1, _larger) + 0.0
    largest = _larger(-low, high)
    is_finite = largest < float("inf")
    if SYMMETRIC:
        span = tl.minimum(largest, LARGEST)
    else:
        low_bits = _round_down(tl.clamp(low, LEAST, LARGEST), DTYPE, INTEGERS)
        low = _from_bits(low_bits, DTYPE, INTEGERS)
        span = tl.maximum(tl.clamp(high, -LARGEST, LARGEST) - low, 0.0)
        values = values - low[:, None]
        _store_bits(numbers, tl.where(is_finite, low_bits, NAN), is_group, DTYPE.primitive_bitwidth // 8)
        numbers += DTYPE.primitive_bitwidth // 8

    step = tl.div_rn(span, HIGHEST).to(DTYPE)
    is_short = step.to(tl.float32) * HIGHEST < span
    # No step is negative, so their bits are in the order of the numbers.
    step_bits = tl.minimum(_to_bits(step, INTEGERS) + is_short.to(tl.int32), LARGEST_STEP)
    step = _from_bits(step_bits, DTYPE, INTEGERS)
    _store_bits(numbers, tl.where(is_finite, step_bits, NAN), is_group, DTYPE.primitive_bitwidth // 8)

    positions = tl.div_rn(values, tl.where(step == 0, 1.0, step)[:, None])
    levels = tl.clamp(positions, LOWEST, HIGHEST) + _ROUNDER
    codes = (levels - LOWEST).to(tl.int32, bitcast=True)
    codes = tl.where(is_finite[:, None], codes, 0).to(tl.uint8)
    if NUM_BITS == 2:
        even, odd = tl.split(tl.reshape(codes, (GROUPS, GROUP_SIZE // 2, 2)))
        codes = even | odd << 2
    if NUM_BITS <= 4:
        even, odd = tl.split(tl.reshape(codes, (GROUPS, CODE_BYTES, 2)))
        codes = even | odd << 4
    tl.store(records[:, None] + tl.arange(0, CODE_BYTES)[None, :], codes, is_group[:, None])


@triton.jit(do_not_specialize=["num_groups"])
def _decode(
    rows,
    payload,
    num_groups,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    NUM_BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    LOWEST: tl.constexpr,
    DTYPE: tl.constexpr,
    INTEGERS: tl.constexpr,
    LIMIT: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * GROUPS
    groups = tl.arange(0, GROUPS)
    is_group = groups < num_groups - first
    records = payload + first * GROUP_BYTES + groups * GROUP_BYTES
    numbers = records + CODE_BYTES

    codes = tl.load(records[:, None] + tl.arange(0, CODE_BYTES)[None, :], is_group[:, None], 0)
    if NUM_BITS <= 4:
        codes = tl.interleave(codes & 15, codes >> 4)
    if NUM_BITS == 2:
        codes = tl.interleave(codes & 3, codes >> 2)
    values = codes.to(tl.float32)
    if SYMMETRIC:
        values = (values + LOWEST) * _load_number(numbers, is_group, DTYPE, INTEGERS)[:, None]
    else:
        low = _load_number(numbers, is_group, DTYPE, INTEGERS)
        step = _load_number(numbers + DTYPE.primitive_bitwidth // 8, is_group, DTYPE, INTEGERS)
        values = values * step[:, None] + low[:, None]
    if LIMIT is not None:
        values = tl.clamp(values, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)

    places = groups[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    tl.store(rows + first * GROUP_SIZE + places, values.to(rows.dtype.element_ty), is_group[:, None])


@triton.jit
def _smaller(one, other):
    return tl.minimum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _larger(one, other):
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _to_bits(numbers, INTEGERS: tl.constexpr):
    return numbers.to(INTEGERS, bitcast=True).to(tl.int32)


@triton.jit
def _from_bits(bits, DTYPE: tl.constexpr, INTEGERS: tl.constexpr):
    return bits.to(INTEGERS).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _round_down(values, DTYPE: tl.constexpr, INTEGERS: tl.constexpr):
    rounded = values.to(DTYPE)
    bits = _to_bits(rounded, INTEGERS)
    below = tl.where(bits > 0, bits - 1, bits + 1)
    return tl.where(rounded.to(tl.float32) > values, below, bits)


@triton.jit
def _load_number(places, mask, DTYPE: tl.constexpr, INTEGERS: tl.constexpr):
    bits = tl.load(places, mask, 0).to(tl.int32)
    for byte in tl.static_range(1, DTYPE.primitive_bitwidth // 8):
        bits |= tl.load(places + byte, mask, 0).to(tl.int32) << 8 * byte
    return _from_bits(bits, DTYPE, INTEGERS)


@triton.jit
def _store_bits(places, bits, mask, NUM_BYTES: tl.constexpr):
    for byte in tl.static_range(NUM_BYTES):
        tl.store(places + byte, (bits >> 8 * byte).to(tl.uint8), mask)
