"""Rows that are read block by block: what a table is to those who stream it.

A block is the unit that a disk, a database or a network brings at full speed: a row group of a Parquet file,
a range of pages of a heap, a slice of a memory-mapped array.
"""

import hashlib
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from capstan.errors import UsageError

Rows = Mapping[str, NDArray[np.generic]]
"""Some rows: for each column an array with one entry a row, which may itself have a shape."""


class BlockSource(Protocol):
    """Rows in blocks. Blocks are counted from 0, and each may have another number of rows."""

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest of what is read; another one means that the data changed."""
        ...

    def num_rows(self, block: int) -> int:
        """Rows of a block, known without reading it."""
        ...

    def read(self, block: int) -> Rows:
        """The rows of one block."""
        ...


class NumpyBlocks:
    """Arrays of equally many rows, in memory or memory-mapped, in blocks of `rows_per_block`; the last block
    has what is left.

    Raises:
        UsageError: no array, arrays of different lengths, or blocks of less than one row.
    """

    def __init__(self, columns: Rows, *, rows_per_block: int) -> None:
        lengths = {name: len(column) for name, column in columns.items()}
        if not lengths or len(set(lengths.values())) > 1:
            raise UsageError(f"Blocks are made of columns that have equally many rows; found {lengths}.")
        if rows_per_block < 1:
            raise UsageError(f"A block has at least one row; rows_per_block is {rows_per_block}.")
        self._columns, self._rows_per_block = dict(columns), rows_per_block
        self._num_rows = next(iter(lengths.values()))

    @property
    def num_blocks(self) -> int:
        return -(-self._num_rows // self._rows_per_block)

    @property
    def fingerprint(self) -> str:
        """Of names, types, shapes and the first and last row; memory is not read from end to end for it."""
        digest = hashlib.sha256(str(self._rows_per_block).encode())
        for name, column in sorted(self._columns.items()):
            digest.update(f"{name}|{column.dtype.str}|{column.shape}".encode())
            for ends in (column[:1], column[-1:]):
                digest.update(np.ascontiguousarray(ends).tobytes())
        return digest.hexdigest()

    def num_rows(self, block: int) -> int:
        self._require(block)
        return min(self._rows_per_block, self._num_rows - block * self._rows_per_block)

    def read(self, block: int) -> Rows:
        self._require(block)
        rows = slice(block * self._rows_per_block, (block + 1) * self._rows_per_block)
        return {name: column[rows] for name, column in self._columns.items()}

    def _require(self, block: int) -> None:
        if not 0 <= block < self.num_blocks:
            raise UsageError(f"There are blocks 0 to {self.num_blocks - 1}; wanted block {block}.")
