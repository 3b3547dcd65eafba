"""A symmetric grid without a level at 0, so that all 2**bits codes are levels."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from capstan.codecs import Codec, bits
from capstan.codecs.dtypes import require_floating
from capstan.codecs.elements import reinterpret
from capstan.codecs.grid import nearest, stochastic
from capstan.errors import InputError, UsageError


@dataclass(frozen=True, kw_only=True)
class MidRise(Codec):
    """Every group of `group_size` consecutive elements of the last dimension on a symmetric grid.

        L = 2**num_bits - 1,  scale = max|value| as bfloat16
        code = round((value / scale + 1) / 2 * L),  decoded = (2 code / L - 1) scale

    At 2 bits the levels are -1, -1/3, 1/3 and 1 times the scale. 0 is none of them: where all is 0 the scale
    is 0. A record is a group's codes, the first in the lowest bits, then its scale; the last group of a row
    is filled up with zeros. Values that are not finite raise `InputError` on the CPU; elsewhere they are NaN.

    Source: the symmetric block quantiser in which 4 stages at 2 bits converge; a mid-rise quantiser.
    Differs: scales are commonly float16, which holds no gradient below 2**-24.
    """

    num_bits: int
    group_size: int = 64
    is_stochastic: bool = False

    def __post_init__(self) -> None:
        if self.num_bits not in bits.WIDTHS or self.group_size < 1:
            raise UsageError(
                f"Choose 1 to 8 bits and groups of 1 or more, found {self.num_bits} and {self.group_size}."
            )

    @property
    def name(self) -> str:
        rounding = ":stochastic" if self.is_stochastic else ""
        return f"midrise{self.num_bits}:{self.group_size}{rounding}"

    @classmethod
    def from_name(cls, name: str) -> Self:
        kind, _, rest = name.partition(":")
        size, _, rounding = rest.partition(":")
        num_bits = kind.removeprefix("midrise")
        if not (num_bits.isdecimal() and size.isdecimal()) or rounding not in ("", "stochastic"):
            raise UsageError(f"Cannot read the codec {name!r}. Wanted midriseB:SIZE[:stochastic].")
        return cls(num_bits=int(num_bits), group_size=int(size), is_stochastic=rounding == "stochastic")

    def encoded_bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        require_floating(self.name, dtype)
        rows = torch.Size(shape[:-1]).numel()
        return rows * -(-(shape[-1] if shape else 1) // self.group_size) * self._record_bytes

    def scratch_bytes(self, shape: tuple[int, ...], dtype: torch.dtype, *, device_type: str = "cuda") -> int:
        """The codes and the values of all groups, with room for what unpacking moves."""
        return 16 * self.encoded_bytes(shape, dtype) * 8 // self.num_bits

    @property
    def _code_bytes(self) -> int:
        return bits.packed_bytes(self.group_size, self.num_bits)

    @property
    def _record_bytes(self) -> int:
        return self._code_bytes + torch.bfloat16.itemsize

    @property
    def _highest(self) -> int:
        return int(2**self.num_bits - 1)

    def _write(self, values: Tensor, payload: Tensor, seed: int | None) -> None:
        if self.is_stochastic and seed is None:
            raise UsageError(f"{self.name} rounds stochastically. Give a seed, a new one for every tensor.")
        rows = values.to(torch.float32) if values.dim() else values.to(torch.float32)[None]
        filled = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % self.group_size))
        groups = filled.reshape(-1, self.group_size)
        largest = groups.abs().amax(-1, keepdim=True)
        if groups.device.type == "cpu" and not largest.isfinite().all():
            raise InputError("Only values that are finite in float32 can be quantised. Use a cast there.")
        # bfloat16 reaches as far as float32, but rounding could make the largest infinite.
        scales = largest.clamp(max=torch.finfo(torch.bfloat16).max).to(torch.bfloat16)
        scale = scales.to(torch.float32)
        positions = (groups / scale.masked_fill(scale == 0, 1)).add_(1).mul_(self._highest / 2)
        positions.clamp_(0, self._highest)
        if self.is_stochastic:
            assert seed is not None
            positions = stochastic(positions, seed=seed, first=0)
        else:
            positions = nearest(positions)
        records = payload.view(-1, self._record_bytes)
        records[:, : self._code_bytes] = bits.pack(positions.to(torch.uint8), self.num_bits)
        records[:, self._code_bytes :] = scales.view(torch.uint8)

    def _read(self, payload: Tensor, dtype: torch.dtype, out: Tensor) -> None:
        records = payload.view(-1, self._record_bytes)
        codes = bits.unpack(records[:, : self._code_bytes], self.group_size, self.num_bits)
        scales = reinterpret(records[:, self._code_bytes :].flatten(), torch.bfloat16).to(torch.float32)
        groups = codes.to(torch.float32).mul_(2 / self._highest).sub_(1).mul_(scales[:, None])
        rows = groups.view(*(out.shape[:-1] if out.dim() else ()), -1)
        out.copy_(rows[..., : out.shape[-1]] if out.dim() else rows[0])
