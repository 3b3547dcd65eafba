"""BAGUA's 8-bit codec, byte for byte: one minimum and maximum for a whole tensor."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from capstan.codecs.codec import Codec
from capstan.codecs.dtypes import num_elements, require_floating
from capstan.codecs.elements import bytes_of, reinterpret, saturating_cast
from capstan.errors import InputError, UsageError

HEADER_BYTES = 32
_EPSILON = 1e-7


@dataclass(frozen=True, kw_only=True)
class MinMaxUInt8(Codec):
    """Every element as one byte between the tensor's extremes.

        scale = 255 / (high - low + 1e-7)
        top = rint(high * scale),  bottom = top - 255
        code = min(rint(value * scale), top) - bottom,  decoded = (code + bottom) / scale

    The payload is low, high in the tensor's type, zeros up to 32 bytes, then one byte an element. For
    exchange with BAGUA and comparison with it; for training take `group8:512:float32`: here one outlier
    coarsens the whole tensor, gradients below 1e-7 vanish in the epsilon, and a code below 0 wraps.

    Source: BAGUA, bagua_kernels.cu, and its oracle in torch; arXiv 2107.01499.
    Differs: with `clamped` a code is kept within 0 .. 255 instead of wrapping to the other end.
    """

    clamped: bool = False

    @property
    def name(self) -> str:
        return "minmax8:clamped" if self.clamped else "minmax8"

    @classmethod
    def from_name(cls, name: str) -> Self:
        if name not in ("minmax8", "minmax8:clamped"):
            raise UsageError(f"Cannot read the codec {name!r}. Wanted minmax8 or minmax8:clamped.")
        return cls(clamped=name.endswith("clamped"))

    def encoded_bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        require_floating(self.name, dtype)
        return HEADER_BYTES + num_elements(shape)

    def scratch_bytes(self, shape: tuple[int, ...], dtype: torch.dtype, *, device_type: str = "cuda") -> int:
        """The decoded values, and what converting them takes."""
        return 32 * num_elements(shape) + 128

    def _write(self, values: Tensor, payload: Tensor, seed: int | None) -> None:
        payload[:HEADER_BYTES] = 0
        if not values.numel():
            return
        extremes = torch.stack((values.min(), values.max()))
        if values.device.type == "cpu" and not torch.isfinite(extremes[1] - extremes[0]):
            raise InputError("Only finite values, of a finite range, can be quantised. Use a cast there.")
        payload[: 2 * values.element_size()] = bytes_of(extremes)
        scale, top = _scale(extremes)
        # Not bottom + 255: where levels are beyond 2**24 that is another number.
        levels = torch.minimum((_wide(values) * scale).round_(), top).sub_(top - 255)
        # By way of a wider integer: what wraps, wraps the same way on every device.
        codes = levels.clamp_(0, 255) if self.clamped else levels
        payload[HEADER_BYTES:] = codes.to(torch.int32).bitwise_and_(255).to(torch.uint8).reshape(-1)

    def _read(self, payload: Tensor, dtype: torch.dtype, out: Tensor) -> None:
        if not out.numel():
            return
        scale, top = _scale(reinterpret(payload[: 2 * dtype.itemsize], dtype))
        values = payload[HEADER_BYTES:].to(scale.dtype).add_(top - 255).div_(scale)
        out.copy_(saturating_cast(values, out.dtype).view(out.shape))


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _scale(extremes: Tensor) -> tuple[Tensor, Tensor]:
    """The scale, and the level of code 255."""
    low, high = _wide(extremes)
    span = high - low + _EPSILON
    scale = torch.full_like(span, 255) / span  # `255 / span` would multiply with a rounded reciprocal
    return scale, torch.round(high * scale)
