"""The codec that changes nothing: the off position of every relaxation."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from capstan.codecs.codec import Codec
from capstan.codecs.dtypes import dtype_name, num_elements
from capstan.codecs.elements import bytes_of, read_elements, read_scratch_bytes, write_elements
from capstan.errors import unknown_name


@dataclass(frozen=True, kw_only=True)
class Identity(Codec):
    """The bytes of the tensor as they are, in C order and the machine's byte order (little-endian).

    Decoding gives the same bits, NaN payloads included, for every element type.
    """

    @property
    def name(self) -> str:
        return "identity"

    @classmethod
    def from_name(cls, name: str) -> Self:
        if name != "identity":
            raise unknown_name("codec", name, ["identity"])
        return cls()

    def encoded_bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        dtype_name(dtype)
        return num_elements(shape) * dtype.itemsize

    def scratch_bytes(self, shape: tuple[int, ...], dtype: torch.dtype, *, device_type: str = "cuda") -> int:
        return read_scratch_bytes(shape, device_type)

    def _write(self, values: Tensor, payload: Tensor, seed: int | None) -> None:
        if values.is_contiguous():
            payload.copy_(bytes_of(values))
        else:
            write_elements(values, payload, values.dtype)

    def _read(self, payload: Tensor, dtype: torch.dtype, out: Tensor) -> None:
        if out.dtype == dtype and out.is_contiguous():
            bytes_of(out).copy_(payload)
        else:
            read_elements(payload, dtype, out)
