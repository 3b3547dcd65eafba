"""Group-wise quantisation: a few bits an element, and two small numbers a group."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Literal, Self

import torch
from torch import Tensor

from capstan.codecs import bits
from capstan.codecs.blocks import Block, blocks
from capstan.codecs.codec import Codec
from capstan.codecs.dtypes import dtype_from_name, dtype_name, require_floating
from capstan.codecs.elements import reinterpret
from capstan.codecs.grid import LARGEST_LEVEL, Grid, nearest, stochastic
from capstan.errors import InputError, UsageError

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_NAME = re.compile(
    r"group(?P<num_bits>[1-8])"
    r"(:(?P<group_size>[0-9]{1,18}))?"
    r"(:(?P<symmetric>symmetric))?"
    r"(:(?P<rounding>nearest|stochastic))?"
    r"(:(?P<scale_dtype>float16|bfloat16|float32))?"
    r"(:dim(?P<dim>-?[0-9]{1,4}))?"
)

# On the CPU a block of about 2**18 elements stays in the caches. Elsewhere each of a block's dozen operations
# costs a launch, which smaller blocks than this do not outweigh.
_CPU_SCRATCH_BYTES = 3 * 2**19
_SCRATCH_BYTES = 64 * 2**20


def _scratch_limit(device_type: str) -> int:
    return _CPU_SCRATCH_BYTES if device_type == "cpu" else _SCRATCH_BYTES


@cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The kernels of `groups_triton`, where there is a CUDA device and Triton that can build them."""
    if device.type != "cuda":
        return None
    try:
        kernels = import_module("capstan.codecs.groups_triton")
    except ImportError:  # builds of torch without CUDA bring no Triton
        return None
    return kernels if kernels.run_on(device) else None


@dataclass(frozen=True, kw_only=True)
class GroupQuantised(Codec):
    """Every group of `group_size` consecutive elements along `dim` on its own grid.

    Asymmetric (the default):

        step = (high - low) / (2**num_bits - 1)
        code = round((value - low) / step),  decoded = low + code * step

    Symmetric, exact at 0 and with the same levels on both sides:

        scale = max|value| / (2**(num_bits - 1) - 1)
        code = round(value / scale),  decoded = code * scale

    `low` is rounded down to `scale_dtype`, then `step` (`scale`) is computed from the rounded `low` and
    rounded up, so that the stored grid covers the group. With `step` as stored:

        |error| <= step / 2 + slack    (nearest)          |error| <= step + slack    (stochastic)
        slack = 2**-21 * (|low| + (2**num_bits - 1) * step)

    The slack is float32's: encoding and decoding make five roundings, each of at most 2**-24 of the
    parenthesis. Decoding into a narrower type adds that type's rounding. A constant group that `scale_dtype`
    represents decodes exactly; only for such a group is the step 0, so a small range does not collapse.
    Stochastic rounding is unbiased: over seeds, the mean of `decoded` is the value, within the slack. Its
    random numbers are a function of the seed and of the element's position in the payload.

    Beyond the range of `scale_dtype` the grid saturates: `low` is at least -M and `step` at most M, where
    M = min(largest number of `scale_dtype`, 2**126); values outside become the nearest level. A value that is
    NaN or infinite (in float32) raises `InputError` on the CPU. On an accelerator looking would wait for the
    device, so there its whole group decodes to NaN.

    The payload is one record for each group: the codes, `num_bits` each, the first in the lowest bits; then
    `low` and `step`, or `scale`. Groups are in C order with `dim` moved last, so rows can be appended, cut
    out and gathered. The last group of a row is filled up by repeating the row's last element.

    Source: FlexGen, group-wise quantisation, arXiv 2303.06865. Interleaved records: GGUF's blocks.
    Differs: the paper's code keeps the extremes apart from the codes, has 4 bits only, multiplies by the
    inverse of the step, which overflows for small ranges, and fills groups up with zeros, which widens them.
    Here the step divides.
    """

    num_bits: int
    group_size: int = 64
    dim: int = -1
    symmetric: bool = False
    rounding: Literal["nearest", "stochastic"] = "nearest"
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.num_bits not in bits.WIDTHS:
            raise UsageError(f"num_bits must be one of {bits.WIDTHS}, found {self.num_bits}.")
        if self.num_bits == 1 and self.symmetric:
            raise UsageError("Of 1 bit a symmetric grid has one level, 0. Use the codec sign, or 2 bits.")
        if self.group_size < 1:
            raise UsageError(f"group_size must be at least 1, found {self.group_size}.")
        if self.rounding not in ("nearest", "stochastic"):
            raise UsageError(f"rounding must be 'nearest' or 'stochastic', found {self.rounding!r}.")
        if self.scale_dtype not in SCALE_DTYPES:
            known = ", ".join(map(dtype_name, SCALE_DTYPES))
            raise UsageError(f"scale_dtype must be one of {known}, found {self.scale_dtype}.")

    @property
    def name(self) -> str:
        parts = [f"group{self.num_bits}:{self.group_size}"]
        parts += ["symmetric"] * self.symmetric
        parts += ["stochastic"] * (self.rounding == "stochastic")
        parts += [dtype_name(self.scale_dtype)] * (self.scale_dtype != torch.float16)
        parts += [f"dim{self.dim}"] * (self.dim != -1)
        return ":".join(parts)

    @classmethod
    def from_name(cls, name: str) -> Self:
        match = _NAME.fullmatch(name)
        if match is None:
            raise UsageError(
                f"Cannot read the codec {name!r}. "
                "Wanted groupB[:SIZE][:symmetric][:stochastic][:SCALE_DTYPE][:dimD], "
                "such as group4:64 or group8:32:symmetric:float32:dim0."
            )
        return cls(
            num_bits=int(match["num_bits"]),
            group_size=int(match["group_size"] or 64),
            dim=int(match["dim"] or -1),
            symmetric=match["symmetric"] is not None,
            rounding="stochastic" if match["rounding"] == "stochastic" else "nearest",
            scale_dtype=dtype_from_name(match["scale_dtype"] or "float16"),
        )

    @property
    def group_bytes(self) -> int:
        """The size of one record: ceil(group_size * num_bits / 8) bytes of codes, then the stored numbers."""
        return self._code_bytes + self._grid.num_numbers * self.scale_dtype.itemsize

    def num_groups(self, shape: tuple[int, ...]) -> int:
        """The number of records; each row along `dim` begins a new one."""
        sizes = list(shape) or [1]
        if not -len(sizes) <= self.dim < len(sizes):
            raise InputError(
                f"{self.name} groups along dim {self.dim}, found a tensor of shape {tuple(shape)}."
            )
        length = sizes.pop(self.dim)
        return math.prod(sizes) * -(-length // self.group_size)

    def encoded_bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        require_floating(self.name, dtype)
        return self.num_groups(shape) * self.group_bytes

    def scratch_bytes(self, shape: tuple[int, ...], dtype: torch.dtype, *, device_type: str = "cuda") -> int:
        """What one group needs, and beyond that at most 64 MiB, on a processor 1.5 MiB."""
        groups = min(self.num_groups(shape), self._groups_per_block(_scratch_limit(device_type)))
        return groups * self._group_scratch_bytes

    def records(self, codes: Tensor, numbers: Tensor) -> Tensor:
        """The payload of groups whose grids are known: uint8 codes `[groups, group_size]`, counted from the
        lowest level, and each group's stored numbers in `scale_dtype`, `[groups, 2]` for (low, step) or
        `[groups, 1]` where symmetric. A row's last group is filled up with any codes."""
        return torch.cat((bits.pack(codes, self.num_bits), numbers.view(torch.uint8)), -1).flatten()

    @property
    def _grid(self) -> Grid:
        return Grid(num_bits=self.num_bits, symmetric=self.symmetric, dtype=self.scale_dtype)

    @property
    def _code_bytes(self) -> int:
        return bits.packed_bytes(self.group_size, self.num_bits)

    @property
    def _group_scratch_bytes(self) -> int:
        # An element: 4 for the value, 1 each for the code and its shifted copy, both up to a word of 8 codes,
        # and for the widths whose halves move by less than they are wide one for what moves. A group: its two
        # stored numbers cut out, aligned and in float32, 8 each.
        return (7 if self.num_bits in (5, 6, 7) else 6) * (self.group_size + 7) + 24

    def _groups_per_block(self, scratch_bytes: int) -> int:
        return max(1, scratch_bytes // self._group_scratch_bytes)

    def _blocks(self, rows: Tensor) -> Iterator[Block]:
        scratch = _scratch_limit(rows.device.type)
        return blocks(rows, group_size=self.group_size, max_groups=self._groups_per_block(scratch))

    def _rows(self, values: Tensor) -> Tensor:
        return values.movedim(self.dim, -1) if values.dim() else values

    def _kernels_for(self, rows: Tensor) -> ModuleType | None:
        """The kernels that take such rows in one pass, if there are any."""
        kernels = _kernels(rows.device)
        return kernels if kernels and kernels.cover(self._grid, self.group_size, rows) else None

    def _write(self, values: Tensor, payload: Tensor, seed: int | None) -> None:
        if self.rounding == "stochastic" and seed is None:
            raise UsageError(f"{self.name} rounds stochastically. Give a seed, a new one for every tensor.")
        rows = self._rows(values)
        if self.rounding == "nearest" and (kernels := self._kernels_for(rows)):
            kernels.encode(self._grid, self.group_size, rows, payload)
            return
        records = payload.view(-1, self.group_bytes)
        for first, count, part in self._blocks(rows):
            self._write_groups(self._filled_up(part, count), records[first : first + count], first, seed)

    def _write_groups(self, values: Tensor, records: Tensor, first: int, seed: int | None) -> None:
        numbers = self._grid.fit(values)
        positions = self._grid.positions(values, numbers)
        if seed is None or self.rounding == "nearest":
            levels = nearest(positions)
        else:
            levels = stochastic(positions, seed=seed, first=first * self.group_size)
        codes = levels.sub_(self._grid.lowest).to(torch.uint8)
        records[:, : self._code_bytes] = bits.pack(codes, self.num_bits)
        records[:, self._code_bytes :] = numbers.view(torch.uint8)

    def _read(self, payload: Tensor, dtype: torch.dtype, out: Tensor) -> None:
        rows = self._rows(out)
        if kernels := self._kernels_for(rows):
            kernels.decode(self._grid, self.group_size, payload, rows)
            return
        records = payload.view(-1, self.group_bytes)
        for first, count, part in self._blocks(rows):
            values = self._in_groups(part, count)
            if values is not None:
                self._read_groups(records[first : first + count], values)
            else:
                self._read_through(records[first : first + count], part)

    def _read_groups(self, records: Tensor, values: Tensor) -> None:
        codes = bits.unpack(records[:, : self._code_bytes], self.group_size, self.num_bits)
        numbers = reinterpret(records[:, self._code_bytes :].flatten(), self.scale_dtype)
        self._grid.values(codes, numbers.view(len(records), -1), values)

    def _read_through(self, records: Tensor, part: Tensor) -> None:
        """Decode by way of a temporary, for memory of another type or stride or with a short last group."""
        values = torch.empty((len(records), self.group_size), dtype=torch.float32, device=part.device)
        self._read_groups(records, values)
        limit = torch.finfo(part.dtype).max
        if limit < LARGEST_LEVEL:
            values.clamp_(-limit, limit)
        part.copy_(values.view(*part.shape[:-1], -1)[..., : part.shape[-1]])

    def _in_groups(self, part: Tensor, num_groups: int) -> Tensor | None:
        """The part as float32 (groups, group_size) without a copy, or None where it is not laid out so."""
        if part.dtype == torch.float32 and part.is_contiguous() and part.shape[-1] % self.group_size == 0:
            return part.view(num_groups, self.group_size)
        return None

    def _filled_up(self, part: Tensor, num_groups: int) -> Tensor:
        """The part as float32 (groups, group_size), short groups filled up by their last element."""
        values = self._in_groups(part, num_groups)
        if values is not None:
            return values
        values = torch.empty((num_groups, self.group_size), dtype=torch.float32, device=part.device)
        rows = values.view(*part.shape[:-1], -1)
        rows[..., : part.shape[-1]] = part
        rows[..., part.shape[-1] :] = part[..., -1:]
        return values
