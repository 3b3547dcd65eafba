"""A quantised checkpoint, read as if its weights were plain.

A matrix that the files hold as codes, scales and zero points is one tensor here, decoded while it is read. So
whoever maps, places and loads weights needs to know no format. Integers in groups lie on a grid that
`GroupQuantised` has as well: such matrices can also be read as its records, which are exact and as small.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from capstan.codecs import GroupQuantised
from capstan.errors import InputError, UnsupportedModel
from capstan.models.meta_model import MetaModel
from capstan.models.quantisation import find_matrices, read_whole, require_known
from capstan.models.quantised_matrices import QuantisedMatrix
from capstan.models.refusals import stated_quantisation
from capstan.storage import Checkpoint, TensorRange

# Codes times these are exact in float32: a grid's lowest level and step say the same as zero point and scale.
_SHORT_SCALES = (torch.float16, torch.bfloat16)
# A matrix is decoded in runs of about so many bytes.
_DECODING_BYTES = 16 << 20


def open_checkpoint(folder: Path) -> Checkpoint:
    """The weights in `folder`; those that its config.json calls quantised as values of float32.

    Raises:
        InputError: see `Checkpoint`; or the weights are not what config.json says.
        UnsupportedModel: they are quantised in a format that is not read.
    """
    quantisation = stated_quantisation(folder)
    if quantisation is None:
        return Checkpoint(folder)
    require_known(quantisation)
    stored = Checkpoint(folder)
    return DecodedCheckpoint(stored, find_matrices(stored, quantisation), torch.float32)


def dominant_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating-point dtype that most bytes of the checkpoint have, apart from what is quantised."""
    decoded = checkpoint.matrices if isinstance(checkpoint, DecodedCheckpoint) else {}
    totals: dict[torch.dtype, int] = {}
    for entry in checkpoint.tensors.values():
        if entry.dtype.is_floating_point and entry.name not in decoded:
            totals[entry.dtype] = totals.get(entry.dtype, 0) + entry.size_bytes
    if not totals:
        raise InputError(
            f"{checkpoint.folder} holds no floating-point tensors; is it quantised? Give plain weights."
        )
    return max(totals, key=lambda dtype: totals[dtype])


class DecodedCheckpoint(Checkpoint):
    """The tensors of `stored`, with `matrices` in the place of their parts, as values of `dtype`."""

    def __init__(self, stored: Checkpoint, matrices: Iterable[QuantisedMatrix], dtype: torch.dtype) -> None:
        self.folder = stored.folder
        self.stored, self.dtype = stored, dtype
        self.matrices: Mapping[str, QuantisedMatrix] = {matrix.name: matrix for matrix in matrices}
        taken = {part for matrix in self.matrices.values() for part in matrix.parts.values()}
        plain = {name: entry for name, entry in stored.tensors.items() if name not in taken}
        self.tensors = plain | {matrix.name: self._entry(matrix) for matrix in self.matrices.values()}
        self._loaded: tuple[str, Mapping[str, Tensor]] = ("", {})

    def _entry(self, matrix: QuantisedMatrix) -> TensorRange:
        codes = self.stored.tensors[matrix.parts["codes"]]
        return TensorRange(
            name=matrix.name,
            file=codes.file,
            offset=codes.offset,
            size_bytes=prod(matrix.shape) * self.dtype.itemsize,
            dtype=self.dtype,
            shape=matrix.shape,
        )

    def in_dtype(self, dtype: torch.dtype) -> Self:
        """The same checkpoint, decoded into values of `dtype`."""
        return type(self)(self.stored, self.matrices.values(), dtype)

    def grid_of(self, names: Sequence[str]) -> GroupQuantised | None:
        """The codec that holds tensors of the checkpoint exactly, with as few bits, if one does for all."""
        codecs = {self._codec(self.matrices[name]) if name in self.matrices else None for name in names}
        return codecs.pop() if len(codecs) == 1 else None

    def _codec(self, matrix: QuantisedMatrix) -> GroupQuantised | None:
        scales = self.stored.tensors[matrix.parts["scales"]]
        if matrix.num_bits is None or "group_of" in matrix.parts or scales.dtype not in _SHORT_SCALES:
            return None
        return GroupQuantised(
            num_bits=matrix.num_bits, group_size=matrix.group_size, scale_dtype=torch.float32
        )

    def read(self, name: str, target: Tensor, *, start: int = 0) -> None:
        """As `Checkpoint.read`; of a quantised matrix, the bytes of its values."""
        if name not in self.matrices:
            self.stored.read(name, target, start=start)
            return
        matrix, parts = self.matrices[name], self._parts(name)
        row_bytes = matrix.num_columns * self.dtype.itemsize
        end = start + target.numel()
        rows_at_once = max(1, _DECODING_BYTES // row_bytes)
        for row in range(start // row_bytes, -(-end // row_bytes), rows_at_once):
            count = min(rows_at_once, -(-end // row_bytes) - row)
            values = matrix.values(parts, row, count).to(self.dtype).view(torch.uint8).flatten()
            first = row * row_bytes
            taken = values[max(start - first, 0) : end - first]
            place = max(first - start, 0)
            target[place : place + taken.numel()] = taken

    def records(self, name: str, first: int, count: int) -> Tensor:
        """Rows of a quantised matrix as its own codec (`grid_of`) holds them: their payload."""
        matrix = self.matrices[name]
        codec = self._codec(matrix)
        codes, scales, zeros = matrix.rows(self._parts(name), first, count)
        assert codec is not None
        assert zeros is not None
        missing = -matrix.num_columns % codec.group_size
        codes = torch.nn.functional.pad(codes, (0, missing)).view(-1, codec.group_size)
        numbers = torch.stack((-zeros * scales, scales), -1).view(-1, 2)
        return codec.records(codes, numbers)

    def _parts(self, name: str) -> Mapping[str, Tensor]:
        """A matrix's parts; those of the last one are kept, since matrices are read in runs."""
        if self._loaded[0] != name:
            parts = self.matrices[name].parts
            self._loaded = (name, {role: read_whole(self.stored, part) for role, part in parts.items()})
        return self._loaded[1]

    def close(self) -> None:
        """Close the files, and let go of what was kept of them."""
        self.stored.close()
        self._loaded = ("", {})


def records_of(checkpoint: Checkpoint, name: str, first: int, count: int) -> Tensor:
    """See `DecodedCheckpoint.records`; no other checkpoint has any."""
    assert isinstance(checkpoint, DecodedCheckpoint)
    return checkpoint.records(name, first, count)


def refuse_transposed(meta: MetaModel) -> None:
    """Raise `UnsupportedModel` for GPT-2 and its kind: their matrices stand the other way round, and formats
    do not say how they lie then."""
    from transformers.pytorch_utils import Conv1D

    if any(isinstance(part, Conv1D) for layer in meta.layers for part in layer.modules()):
        raise UnsupportedModel(
            f"{type(meta.model).__name__} keeps its matrices transposed, and quantised weights do not say "
            "how they lie then. Give plain weights; --weight-bits 8 or 4 quantises them."
        )
