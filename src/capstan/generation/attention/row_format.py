"""How one token's keys and values of one layer become bytes: a row, keys then values, encoded."""

from dataclasses import dataclass
from functools import cached_property
from math import gcd

import torch
from torch import Tensor

from capstan.codecs import Cast, Codec, GroupQuantised, Identity
from capstan.errors import UsageError
from capstan.models.attention_geometry import AttentionGeometry
from capstan.models.weight_manifest import GROUP_SIZE, decoding_scratch_bytes

_BITS = (16, 8, 4)


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How one token's keys and values of one layer become bytes."""

    geometry: AttentionGeometry
    codec: Codec
    dtype: torch.dtype
    device_type: str

    @property
    def _key_shape(self) -> tuple[int, int]:
        return (self.geometry.num_key_heads, self.geometry.key_size)

    @property
    def _value_shape(self) -> tuple[int, int]:
        return (self.geometry.num_key_heads, self.geometry.value_size)

    @cached_property
    def key_bytes(self) -> int:
        return self.codec.encoded_bytes((1, *self._key_shape), self.dtype)

    @cached_property
    def row_bytes(self) -> int:
        return self.key_bytes + self.codec.encoded_bytes((1, *self._value_shape), self.dtype)

    @property
    def is_plain(self) -> bool:
        return isinstance(self.codec, Identity)

    def decoded_bytes(self, num_rows: int) -> int:
        """Bytes that reading `num_rows` rows takes apart from the rows: decoded keys and values, the
        payloads cut out for decoding, and the codec's own scratch."""
        if self.is_plain:
            return 0
        decoded = num_rows * self.geometry.cached_elements * self.dtype.itemsize
        scratch = max(
            decoding_scratch_bytes(
                self.codec, (num_rows, *shape), self.dtype, self.dtype, device_type=self.device_type
            )
            for shape in (self._key_shape, self._value_shape)
        )
        return decoded + num_rows * self.row_bytes + scratch

    def encode(self, key: Tensor, value: Tensor) -> Tensor:
        """key `[tokens, key heads, size]`, value alike → rows `[tokens, row bytes]`."""
        count = key.shape[0]
        if self.is_plain:
            return torch.cat((key.flatten(1), value.flatten(1)), dim=1).view(torch.uint8)
        parts = [self.codec.encode(part).payload.view(count, -1) for part in (key, value)]
        return torch.cat(parts, dim=1)

    def decode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows `[sequences, rows, row bytes]` → keys and values `[sequences, rows, key heads, size]`."""
        if self.is_plain:
            values = rows.view(self.dtype)
            split = self.key_bytes // self.dtype.itemsize
            keys, values = values[..., :split], values[..., split:]
            return keys.unflatten(-1, self._key_shape), values.unflatten(-1, self._value_shape)
        keys, values = rows[..., : self.key_bytes], rows[..., self.key_bytes :]
        return self._decode(keys, self._key_shape), self._decode(values, self._value_shape)

    def _decode(self, payload: Tensor, shape: tuple[int, int]) -> Tensor:
        full = (*payload.shape[:2], *shape)
        out = torch.empty(full, dtype=self.dtype, device=payload.device)
        self.codec.decode_into(_cut_out(payload).view(-1), full, self.dtype, out)
        return out


def cache_codec(
    cache_bits: int | None,
    geometry: AttentionGeometry,
    *,
    checkpoint_dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> Codec:
    """The codec of one layer's keys and values.

    None keeps them in the checkpoint's dtype, which is exact when the model computes in it. Groups lie
    within a head: their size is the largest divisor of the heads' size up to 64, so none is padded.
    """
    if cache_bits is not None and cache_bits not in _BITS:
        raise UsageError(f"The cache is stored in {', '.join(map(str, _BITS))} bits, not in {cache_bits}.")
    if cache_bits in (4, 8):
        common = gcd(geometry.key_size, geometry.value_size)
        size = max(divisor for divisor in range(1, GROUP_SIZE + 1) if common % divisor == 0)
        return GroupQuantised(num_bits=cache_bits, group_size=size, scale_dtype=torch.float16)
    narrow = torch.float16 if compute_dtype.itemsize > 2 else compute_dtype
    wanted = checkpoint_dtype if cache_bits is None or checkpoint_dtype.itemsize == 2 else narrow
    # What was computed in float32 needs no more, as where a checkpoint is of float64.
    return Identity() if wanted in (compute_dtype, torch.float64) else Cast(dtype=wanted)


def _cut_out(payload: Tensor) -> Tensor:
    """A contiguous copy of bytes that lie apart, in words where they are made of words: that is several times
    faster than byte by byte."""
    word = torch.int64.itemsize
    places = (payload.data_ptr(), payload.shape[-1], *payload.stride()[:-1])
    if payload.is_meta or any(place % word for place in places):
        return payload.contiguous()
    return payload.view(torch.int64).contiguous().view(torch.uint8)
