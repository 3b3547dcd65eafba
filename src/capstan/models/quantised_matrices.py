"""Matrices as quantised checkpoints lay them out, read a few rows at a time.

Every layout stores codes and, for groups of columns, a scale and at times a zero point:

    value = (code - zero) * scale

Codes are floats of 8 bits, or integers of 2, 4 or 8 bits counted from 0, packed into words of 32 bits along
the rows or along the columns. A row is what makes one output.

Sources: DeepSeek-V3's weight files (`weight_scale_inv`, one number for each block of 128 x 128);
compressed-tensors (`weight_packed`, signed codes moved up by half their range); GPTQ as AutoGPTQ writes it
(arXiv 2210.17323; `qweight`, packed along inputs, zero points less one); AWQ as AutoAWQ writes it for its
kernel "gemm" (arXiv 2306.00978; packed along outputs in the order 0 2 4 6 1 3 5 7).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

WORD_BITS = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the columns whose codes follow each other in a word
_E8M0_BIAS = 127  # of scales that are only an exponent, in a byte


class Rows(NamedTuple):
    """Some rows of a matrix: codes `[rows, columns]`, scales and zero points (float32) `[rows, groups]`."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


@dataclass(frozen=True, kw_only=True)
class QuantisedMatrix(ABC):
    """One matrix, or a stack of them, that a checkpoint holds as several tensors.

    `parts` are their names by role. `group_size` columns share a scale, in their order, unless `parts` has
    "group_of", the group of each column. `num_bits` is None where codes are floats.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    group_size: int
    num_bits: int | None

    @property
    def num_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def num_columns(self) -> int:
        return self.shape[-1]

    @abstractmethod
    def rows(self, parts: Mapping[str, Tensor], first: int, count: int) -> Rows:
        """Rows `first` up to, not including, `first + count`, from the parts by role."""

    def values(self, parts: Mapping[str, Tensor], first: int, count: int) -> Tensor:
        """What rows stand for, in float32: `[count, columns]`."""
        codes, scales, zeros = self.rows(parts, first, count)
        values = codes.to(torch.float32)
        if zeros is not None:
            values -= self._of_columns(parts, zeros)
        return values.mul_(self._of_columns(parts, scales))

    def _of_columns(self, parts: Mapping[str, Tensor], numbers: Tensor) -> Tensor:
        """Each column's number, of `[rows, groups]`."""
        if "group_of" in parts:
            return numbers[:, parts["group_of"].long()]
        if numbers.shape[1] == 1:
            return numbers
        return numbers.repeat_interleave(self.group_size, dim=1)[:, : self.num_columns]


@dataclass(frozen=True, kw_only=True)
class ScaledMatrix(QuantisedMatrix):
    """A byte an element: floats of 8 bits, or signed integers. A scale for each block of `block_rows` rows of
    each matrix of a stack, and `group_size` columns."""

    block_rows: int

    def rows(self, parts: Mapping[str, Tensor], first: int, count: int) -> Rows:
        codes = parts["codes"].view(-1, self.num_columns)[first : first + count]
        scales = self._of_rows(parts["scales"], first, count)
        if self.num_bits is None:
            return Rows(codes, scales, None)
        half = 1 << (self.num_bits - 1)
        zeros = torch.full_like(scales, half)
        if "zeros" in parts:
            zeros += self._of_rows(parts["zeros"], first, count)
        return Rows((codes.to(torch.int16) + half).to(torch.uint8), scales, zeros)

    def _of_rows(self, numbers: Tensor, first: int, count: int) -> Tensor:
        """Each row's numbers, of those of the blocks."""
        blocks_per_matrix = -(-self.shape[-2] // self.block_rows)
        row = torch.arange(first, first + count)
        block = row // self.shape[-2] * blocks_per_matrix + row % self.shape[-2] // self.block_rows
        num_blocks = self.num_rows // self.shape[-2] * blocks_per_matrix
        return as_float32(numbers).view(num_blocks, -1)[block]


@dataclass(frozen=True, kw_only=True)
class RowPackedMatrix(QuantisedMatrix):
    """The codes of a row's columns one after the other in words, as in compressed-tensors."""

    def rows(self, parts: Mapping[str, Tensor], first: int, count: int) -> Rows:
        assert self.num_bits is not None
        taken = slice(first, first + count)
        codes = unpack(parts["codes"][taken], self.num_bits)[:, : self.num_columns]
        scales = as_float32(parts["scales"])
        scales = scales.reshape(1 if scales.numel() == 1 else self.num_rows, -1).expand(self.num_rows, -1)[
            taken
        ]
        return Rows(codes, scales, self._zeros(parts, scales, taken))

    def _zeros(self, parts: Mapping[str, Tensor], scales: Tensor, taken: slice) -> Tensor:
        assert self.num_bits is not None
        half = 1 << (self.num_bits - 1)
        if "zeros" not in parts:
            return torch.full_like(scales, half)
        zeros = parts["zeros"]
        if zeros.dtype == torch.int32:  # packed along the rows
            return unpack(zeros.T, self.num_bits).T[taken].to(torch.float32)
        return (zeros.to(torch.float32) + half).expand(self.num_rows, -1)[taken]


@dataclass(frozen=True, kw_only=True)
class ColumnPackedMatrix(QuantisedMatrix):
    """Transposed, `[inputs, outputs]`, and packed along inputs as by GPTQ, or along outputs as by AWQ. Scales
    and zero points are `[groups, outputs]`."""

    is_awq: bool
    zero_offset: int  # what is added to a stored zero point

    def rows(self, parts: Mapping[str, Tensor], first: int, count: int) -> Rows:
        assert self.num_bits is not None
        if self.is_awq:
            codes = self._outputs(parts["codes"], first, count)
        else:
            taken = parts["codes"][:, first : first + count]
            codes = unpack(taken.T, self.num_bits)[:, : self.num_columns]
        zeros = self._outputs(parts["zeros"], first, count)
        zeros = (zeros + self.zero_offset) & ((1 << self.num_bits) - 1)
        scales = as_float32(parts["scales"][:, first : first + count].T)
        return Rows(codes, scales, zeros.to(torch.float32))

    def _outputs(self, words: Tensor, first: int, count: int) -> Tensor:
        """Of `[n, words]` packed along outputs, those of some outputs: `[count, n]`."""
        assert self.num_bits is not None
        per_word = WORD_BITS // self.num_bits
        start, end = first // per_word, -(-(first + count) // per_word)
        order = _AWQ_ORDER if self.is_awq else range(per_word)
        codes = unpack(words[:, start:end], self.num_bits, order)
        return codes[:, first - start * per_word :][:, :count].T.contiguous()


def unpack(words: Tensor, num_bits: int, order: tuple[int, ...] | range | None = None) -> Tensor:
    """The codes in the last dimension's words (int32), the first in the lowest bits: uint8. `order[i]` is the
    place of what is at bits `i * num_bits`."""
    per_word = WORD_BITS // num_bits
    places = range(per_word) if order is None else order
    codes = torch.empty(*words.shape, per_word, dtype=torch.uint8)
    for index, place in enumerate(places):
        codes[..., place] = (words >> (index * num_bits)) & ((1 << num_bits) - 1)
    return codes.flatten(-2)


def as_float32(scales: Tensor) -> Tensor:
    """Scales as float32; a byte is an exponent of 2 (the format E8M0)."""
    if scales.dtype == torch.uint8:
        return (scales.to(torch.float32) - _E8M0_BIAS).exp2()
    return scales.to(torch.float32)
