"""Payloads of plain elements: at any alignment, converted without overflow."""

import torch
from torch import Tensor

from capstan.codecs.blocks import blocks
from capstan.codecs.dtypes import num_elements

# On the CPU what a block needs stays in a core's caches. Elsewhere each operation on a block costs a launch.
_CPU_BLOCK_ELEMENTS = 2**18
_BLOCK_ELEMENTS = 2**21
_READ_BYTES_PER_ELEMENT = 32


def bytes_of(values: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, as a view."""
    # Not view(-1): a tensor of one element is contiguous whatever its stride, and a view keeps that stride.
    return values.as_strided((values.numel(),), (1,)).view(torch.uint8)


def is_aligned(payload: Tensor, dtype: torch.dtype) -> bool:
    """Whether a flat uint8 tensor can be viewed as `dtype`, which must divide its offset and its address.

    A payload in the middle of a slab may have neither.
    """
    return payload.storage_offset() % dtype.itemsize == 0 and payload.data_ptr() % dtype.itemsize == 0


def reinterpret(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of a flat uint8 tensor read as `dtype`: a view where they are aligned, else a copy."""
    return (payload if is_aligned(payload, dtype) else payload.clone()).view(dtype)


def can_overflow(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a finite `source` value can lie beyond the largest `target` value."""
    if not (source.is_floating_point and target.is_floating_point):
        return False
    return torch.finfo(source).max > torch.finfo(target).max


def saturating_cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the nearest `dtype`, ties to even; a finite value beyond its range becomes the largest one.

    Infinities stay where `dtype` has them (float8_e4m3fn has none: they saturate too). NaN stays NaN.
    """
    if not can_overflow(values.dtype, dtype):
        return values.to(dtype)
    # In the source's own type the limit may not exist: bfloat16 would round 65504 up, beyond float16.
    wide = values if values.dtype in (torch.float32, torch.float64) else values.float()
    limit = torch.finfo(dtype).max
    if wide.device.type == "cpu" and _lie_within(wide, limit):
        return wide.to(dtype)
    clamped = wide.clamp(-limit, limit)
    if dtype != torch.float8_e4m3fn:
        clamped = torch.where(wide.isinf(), wide, clamped)
    return clamped.to(dtype)


def _lie_within(values: Tensor, limit: float) -> bool:
    """Whether every value is known to lie within the limit: a look that spares most tensors four passes.

    NaN says no. On an accelerator, looking would wait for the device.
    """
    if not values.numel():
        return True
    low, high = torch.aminmax(values)
    return low.item() >= -limit and high.item() <= limit


def write_elements(values: Tensor, payload: Tensor, dtype: torch.dtype) -> None:
    """Write `values`, of any strides, into a payload of plain elements of `dtype`, converting on the way."""
    if is_aligned(payload, dtype) and not can_overflow(values.dtype, dtype):
        payload.view(dtype).view(values.shape).copy_(values)
        return
    size = dtype.itemsize
    for first, count, part in blocks(values, group_size=1, max_groups=_block_elements(values.device.type)):
        elements = saturating_cast(part, dtype).contiguous()
        payload[first * size : (first + count) * size].copy_(bytes_of(elements))


def read_elements(payload: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    """Write a payload of plain elements of `dtype` into `out`, of any strides, converting on the way."""
    if is_aligned(payload, dtype) and not can_overflow(dtype, out.dtype):
        out.copy_(payload.view(dtype).view(out.shape))
        return
    size = dtype.itemsize
    for first, count, part in blocks(out, group_size=1, max_groups=_block_elements(out.device.type)):
        _read_block(payload[first * size : (first + count) * size], dtype, part)


def _read_block(payload: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    elements = reinterpret(payload, dtype).view(out.shape)
    out.copy_(saturating_cast(elements, out.dtype) if can_overflow(dtype, out.dtype) else elements)


def read_scratch_bytes(shape: tuple[int, ...], device_type: str) -> int:
    """An upper bound of the temporary memory of `read_elements`: at most 8 MiB on a processor, 64 elsewhere.

    An element takes at most 8 bytes each for the realigned, the clamped and the absolute or restored value,
    1 for a mask and 4 for the result: less than 32.
    """
    return _READ_BYTES_PER_ELEMENT * min(num_elements(shape), _block_elements(device_type))


def _block_elements(device_type: str) -> int:
    return _CPU_BLOCK_ELEMENTS if device_type == "cpu" else _BLOCK_ELEMENTS
