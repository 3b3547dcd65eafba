"""One bit an element: its sign, and a scale for each block."""

import re
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from capstan.codecs.bitmaps import pack_bits, unpack_bits
from capstan.codecs.blocks import blocks
from capstan.codecs.codec import Codec
from capstan.codecs.dtypes import num_elements, require_floating
from capstan.codecs.elements import bytes_of, reinterpret, saturating_cast
from capstan.errors import InputError, UsageError

_NAME = re.compile(r"sign(:(?P<block_size>[0-9]{1,9}))?")
_SCALE_BYTES = 4
_ELEMENTS_AT_ONCE = 2**18


@dataclass(frozen=True, kw_only=True)
class Sign(Codec):
    """Signs, and the mean absolute value of every block of `block_size` elements in C order.

        scale = mean|value|,  decoded = scale if value >= 0 else -scale

    That scale is the one nearest to the block: |value - decoded|^2 = |value|^2 - elements * scale^2, so the
    error is smaller than the values unless all are 0. It is biased: use it with `ErrorFeedback`.

    The payload is the scales in float32, then the signs, 1 for negative, from the lowest bit of the first
    byte; each block begins a byte. Values that are not finite raise `InputError` on the CPU; elsewhere
    their block decodes to NaN.

    Source: scaled sign compression, Karimireddy et al., arXiv 1901.09847.
    Differs: the paper has one scale a tensor.
    """

    block_size: int = 1024

    def __post_init__(self) -> None:
        if self.block_size < 8 or self.block_size % 8:
            raise UsageError(f"block_size must be a multiple of 8, found {self.block_size}.")

    @property
    def name(self) -> str:
        return f"sign:{self.block_size}"

    @classmethod
    def from_name(cls, name: str) -> Self:
        match = _NAME.fullmatch(name)
        if match is None:
            raise UsageError(f"Cannot read the codec {name!r}. Wanted sign[:SIZE], such as sign:1024.")
        return cls(block_size=int(match["block_size"] or 1024))

    def num_blocks(self, shape: tuple[int, ...]) -> int:
        """How many scales a tensor of this shape has."""
        return -(-num_elements(shape) // self.block_size)

    def encoded_bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        require_floating(self.name, dtype)
        return _SCALE_BYTES * self.num_blocks(shape) + -(-num_elements(shape) // 8)

    def scratch_bytes(self, shape: tuple[int, ...], dtype: torch.dtype, *, device_type: str = "cuda") -> int:
        """The scales, put apart where they are not aligned, and 40 bytes for each element of a part."""
        part = max(_ELEMENTS_AT_ONCE, self.block_size)
        return 4 * self.num_blocks(shape) + 40 * min(num_elements(shape) + 16, part + 16) + 64

    @property
    def _blocks_at_once(self) -> int:
        return max(1, _ELEMENTS_AT_ONCE // self.block_size)

    def _write(self, values: Tensor, payload: Tensor, seed: int | None) -> None:
        flat = values.reshape(-1)
        scales, signs = self._parts(payload, flat.numel())
        step = self._blocks_at_once * self.block_size
        for first in range(0, flat.numel(), step):
            part = flat[first : first + step].to(torch.float32)
            start, scale = _SCALE_BYTES * (first // self.block_size), self._scales(part)
            scales[start : start + _SCALE_BYTES * scale.numel()] = bytes_of(scale)
            packed = pack_bits(part < 0)
            signs[first // 8 : first // 8 + packed.numel()] = packed

    def _scales(self, part: Tensor) -> Tensor:
        """The mean absolute value of each block, the last of which may be short."""
        whole = part.numel() // self.block_size * self.block_size
        scales = part[:whole].view(-1, self.block_size).abs().mean(-1)
        if whole < part.numel():
            scales = torch.cat((scales, part[whole:].abs().mean(0, keepdim=True)))
        if part.device.type == "cpu" and not scales.isfinite().all():
            raise InputError("Wanted finite values whose mean is finite, found others. Use a cast there.")
        return scales

    def _read(self, payload: Tensor, dtype: torch.dtype, out: Tensor) -> None:
        scales, signs = self._parts(payload, out.numel())
        scale = reinterpret(scales, torch.float32)
        at_once = self._blocks_at_once * self.block_size
        for first, count, part in blocks(out, group_size=1, max_groups=at_once):
            start = first // 8
            flags = unpack_bits(signs[start : -(-(first + count) // 8)], first % 8 + count)[first % 8 :]
            values = flags.to(torch.float32).mul_(-2).add_(1)
            self._scale(values, scale, first)
            part.copy_(saturating_cast(values, part.dtype).view(part.shape))

    def _scale(self, values: Tensor, scale: Tensor, first: int) -> None:
        """Multiply signs, the first of which is that of element `first`, by the scales of their blocks."""
        start, count = first // self.block_size, values.numel()
        head = min(count, -first % self.block_size)
        if head:
            values[:head].mul_(scale[start])
            start += 1
        whole = (count - head) // self.block_size
        end = head + whole * self.block_size
        values[head:end].view(whole, self.block_size).mul_(scale[start : start + whole, None])
        if end < count:
            values[end:].mul_(scale[start + whole])

    def _parts(self, payload: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        end = _SCALE_BYTES * -(-numel // self.block_size)
        return payload[:end], payload[end:]
