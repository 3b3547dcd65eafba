"""Files as blocks of rows, opened by their suffix.

| suffix | a block is |
| --- | --- |
| .parquet, .pq | a row group, or several that are smaller than `rows_per_block` |
| .arrow, .feather, .ipc | a record batch, or several |
| .npy, .npz | `rows_per_block` rows |
| .jsonl, .ndjson | `rows_per_block` lines |
| .libsvm, .svm, .svmlight | `rows_per_block` lines |
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from capstan.errors import InputError, UsageError, unknown_name
from capstan.shuffling.files import RangedFile
from capstan.storage import BlockSource, Rows

DEFAULT_BLOCKS = 500
"""Where its format leaves the choice a table is cut into about so many blocks, as many as in the paper."""
_FEW_ROWS = 64


@runtime_checkable
class SizedBlocks(BlockSource, Protocol):
    """Blocks of which it is known how many bytes each is where it is stored."""

    def size_bytes(self, block: int) -> int:
        """Bytes that reading the block brings from where it is stored."""
        ...


@runtime_checkable
class FetchesAhead(Protocol):
    """A source that can be told which block is read next."""

    def will_read(self, block: int) -> None:
        """Begin to fetch a block's bytes, without waiting."""
        ...


class FileBlocks(ABC):
    """Blocks of one file. Every read finds out whether the file is still the one that was opened."""

    def __init__(self, file: RangedFile, sizes: Sequence[int], layout: str) -> None:
        self.file = file
        self.sizes = tuple(sizes)
        self._layout = layout
        if not sum(self.sizes):
            raise InputError(f"{file} has no rows. Name a file that has some.")

    @property
    def num_blocks(self) -> int:
        return len(self.sizes)

    @property
    def fingerprint(self) -> str:
        """Of the file's identity, its blocks and how its columns are laid out."""
        told = f"{self.file.identity}|{self.sizes}|{self._layout}"
        return hashlib.sha256(told.encode()).hexdigest()

    def num_rows(self, block: int) -> int:
        self._require(block)
        return self.sizes[block]

    def size_bytes(self, block: int) -> int:
        """Bytes that reading the block brings."""
        self._require(block)
        return self._size_bytes(block)

    def read(self, block: int) -> Rows:
        """The rows of one block.

        Raises:
            InputError: the file changed or is damaged, or a value is missing.
        """
        self._require(block)
        self.file.require_same()
        try:
            rows = self._read(block)
        except InputError:
            self.file.require_same()  # a file that changed is the cause, if it did
            raise
        self.file.require_same()
        return rows

    def will_read(self, block: int) -> None:
        """Have the block's bytes fetched while another one is decoded, as for reading in order they are."""
        start, stop = self._range(block)
        self.file.will_read(start, stop - start)

    def _require(self, block: int) -> None:
        if not 0 <= block < self.num_blocks:
            raise UsageError(f"There are blocks 0 to {self.num_blocks - 1}; wanted block {block}.")

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that are read."""

    @abstractmethod
    def _range(self, block: int) -> tuple[int, int]:
        """From which byte to which the block lies, other columns included; (0, 0) where that is not known."""

    @abstractmethod
    def _size_bytes(self, block: int) -> int: ...

    @abstractmethod
    def _read(self, block: int) -> dict[str, NDArray[np.generic]]: ...


def open_source(
    path: str | Path, *, rows_per_block: int | None = None, columns: Sequence[str] | None = None
) -> FileBlocks:
    """A file of rows, by its suffix; see the head of this file. A URL is read through fsspec.

    `columns` are read, by default all. `rows_per_block` is by default a 500th of the rows, of small tables up
    to a 100th; of Parquet and
    Arrow, whose blocks are made by whoever writes the file, it only joins blocks that are smaller.

    Raises:
        InputError: no such file, not what its suffix says, or no rows.
        UsageError: another suffix, a column that is not there, or blocks of less than one row.
        MissingExtra: pyarrow or fsspec is needed and not installed.
    """
    if rows_per_block is not None and rows_per_block < 1:
        raise UsageError(f"A block has at least one row; rows_per_block is {rows_per_block}.")
    suffix = PurePosixPath(str(path)).suffix.lower()
    if suffix in (".parquet", ".pq"):
        from capstan.shuffling.arrow_files import ParquetBlocks

        return ParquetBlocks(RangedFile(path), rows_per_block, columns)
    if suffix in (".arrow", ".feather", ".ipc"):
        from capstan.shuffling.arrow_files import ArrowBlocks

        return ArrowBlocks(RangedFile(path), rows_per_block, columns)
    if suffix in (".npy", ".npz"):
        from capstan.shuffling.numpy_files import NumpyFileBlocks

        return NumpyFileBlocks(RangedFile(path), rows_per_block, columns)
    if suffix in (".jsonl", ".ndjson"):
        from capstan.shuffling.text_files import JsonLines

        return JsonLines(RangedFile(path), rows_per_block, columns)
    if suffix in (".libsvm", ".svm", ".svmlight"):
        from capstan.shuffling.text_files import LibsvmLines

        return LibsvmLines(RangedFile(path), rows_per_block, columns)
    known = ".parquet .pq .arrow .feather .ipc .npy .npz .jsonl .ndjson .libsvm .svm .svmlight"
    raise UsageError(f"{path} has the suffix {suffix!r}. Rows are read from {known.replace(' ', ', ')}.")


def chosen_columns(file: RangedFile, there: Sequence[str], wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The wanted columns in the file's order, all by default."""
    if wanted is None:
        return tuple(there)
    for name in wanted:
        if name not in there:
            raise unknown_name(f"column of {file}", name, there)
    return tuple(name for name in there if name in set(wanted))


def cut(num_rows: int, rows_per_block: int | None) -> list[int]:
    """Rows of each block when a table is cut evenly; by default into about `DEFAULT_BLOCKS`, or, where these
    would be tiny, into fewer of up to `_FEW_ROWS` rows, but never less than a hundred."""
    size = rows_per_block or max(1, -(-num_rows // DEFAULT_BLOCKS), min(_FEW_ROWS, num_rows // 100))
    return [min(size, num_rows - start) for start in range(0, num_rows, size)]


def joined(sizes: Sequence[int], least: int | None) -> list[range]:
    """Neighbours joined until together they have `least` rows; by default each stays alone."""
    if least is None:
        return [range(at, at + 1) for at in range(len(sizes))]
    found, start, rows = [], 0, 0
    for at, size in enumerate(sizes):
        rows += size
        if rows >= least:
            found.append(range(start, at + 1))
            start, rows = at + 1, 0
    if start < len(sizes):
        found.append(range(start, len(sizes)))
    return found
