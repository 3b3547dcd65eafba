"""Fewer bits by a narrower floating-point type."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from capstan.codecs.codec import Codec
from capstan.codecs.dtypes import dtype_name, num_elements, require_floating
from capstan.codecs.elements import read_elements, read_scratch_bytes, write_elements
from capstan.errors import UsageError, unknown_name

TARGETS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
"""What values can be cast to."""


@dataclass(frozen=True, kw_only=True)
class Cast(Codec):
    """Every element rounded to the nearest `dtype`, ties to even.

        |error| <= eps / 2 * max(|value|, smallest_normal)      for |value| <= max

    with `eps`, `smallest_normal` and `max` those of `torch.finfo(dtype)`: a relative error of 2**-11 for
    float16, 2**-8 for bfloat16, 2**-4 for float8_e4m3fn, above the subnormals. A finite value beyond `max`
    becomes `max` with its sign, in encoding and in decoding. Infinities stay infinite where `dtype` has them
    (float8_e4m3fn has none: they become its largest value, 448); NaN stays NaN. A float64 is rounded to
    float32 first.
    """

    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype not in TARGETS.values():
            raise UsageError(f"Cast wanted one of {', '.join(TARGETS)}; found {self.dtype}.")

    @property
    def name(self) -> str:
        return f"cast:{dtype_name(self.dtype)}"

    @classmethod
    def from_name(cls, name: str) -> Self:
        known = {f"cast:{target}": dtype for target, dtype in TARGETS.items()}
        if name not in known:
            raise unknown_name("codec", name, known)
        return cls(dtype=known[name])

    def encoded_bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        require_floating(self.name, dtype)
        return num_elements(shape) * self.dtype.itemsize

    def scratch_bytes(self, shape: tuple[int, ...], dtype: torch.dtype, *, device_type: str = "cuda") -> int:
        return read_scratch_bytes(shape, device_type)

    def _write(self, values: Tensor, payload: Tensor, seed: int | None) -> None:
        write_elements(values, payload, self.dtype)

    def _read(self, payload: Tensor, dtype: torch.dtype, out: Tensor) -> None:
        read_elements(payload, self.dtype, out)
