"""`.npy` and uncompressed `.npz` files as blocks: only the ranges of a block are read."""

import ast
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from capstan.errors import InputError
from capstan.shuffling.files import RangedFile
from capstan.shuffling.sources import FileBlocks, chosen_columns, cut


@dataclass(frozen=True, kw_only=True)
class _Array:
    """Where an array begins in the file, and what it is."""

    offset: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))


class NumpyFileBlocks(FileBlocks):
    """Arrays with one entry a row. A plain `.npy` of numbers is the columns `0`, `1`, …; one of records has
    their fields; an `.npz` has its arrays."""

    def __init__(self, file: RangedFile, rows_per_block: int | None, columns: Sequence[str] | None) -> None:
        self._arrays = _arrays_of(file)
        lengths = {name: array.shape[0] for name, array in self._arrays.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"{file} has arrays of different lengths: {lengths}. A row has a part of each.")
        self._is_table = set(self._arrays) == {""}
        names = _names_of(self._arrays[""]) if self._is_table else list(self._arrays)
        self._columns = chosen_columns(file, names, columns)
        num_rows = next(iter(lengths.values()), 0)
        sizes = cut(num_rows, rows_per_block)
        self._rows_per_block = sizes[0] if sizes else 0
        layout = f"numpy|{self._columns}|{[(a.dtype.str, a.shape) for a in self._arrays.values()]}"
        super().__init__(file, sizes, layout)

    @property
    def columns(self) -> tuple[str, ...]:
        return self._columns

    def _read_arrays(self) -> list[str]:
        return [""] if self._is_table else list(self._columns)

    def _size_bytes(self, block: int) -> int:
        return sum(self.sizes[block] * self._arrays[name].row_bytes for name in self._read_arrays())

    def _range(self, block: int) -> tuple[int, int]:
        array = self._arrays[
            self._read_arrays()[0]
        ]  # of an .npz the first array; others are fetched when read
        start = array.offset + block * self._rows_per_block * array.row_bytes
        return start, start + self.sizes[block] * array.row_bytes

    def _read(self, block: int) -> dict[str, NDArray[np.generic]]:
        found = {}
        for name in self._read_arrays():
            array = self._arrays[name]
            start = array.offset + block * self._rows_per_block * array.row_bytes
            data = self.file.read(start, self.sizes[block] * array.row_bytes)
            found[name] = np.frombuffer(data, array.dtype).reshape(self.sizes[block], *array.shape[1:])
        if not self._is_table:
            return found
        table = found[""]
        if table.dtype.names:
            return {name: table[name] for name in self._columns}
        table = table.reshape(len(table), -1)
        return {name: table[:, int(name)] for name in self._columns}


def _names_of(array: _Array) -> list[str]:
    if array.dtype.names:
        return list(array.dtype.names)
    return [str(at) for at in range(int(np.prod(array.shape[1:], dtype=np.int64)))]


def _arrays_of(file: RangedFile) -> dict[str, _Array]:
    try:
        with file.open() as opened:
            if not file.name.lower().endswith(".npz"):
                return {"": _header(file, "", opened, 0)}
            return _members(file, opened)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, struct.error) as error:
        raise InputError(
            f"{file} cannot be read as NumPy writes it: {str(error).splitlines()[0][:200]}. It may be cut "
            "short or damaged: write it again."
        ) from error


def _members(file: RangedFile, opened: IO[bytes]) -> dict[str, _Array]:
    found = {}
    with zipfile.ZipFile(opened) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise InputError(
                    f"{file} is compressed, so its blocks cannot be read alone. Write it with numpy.savez."
                )
            # The local header says how long its name and its extra field are (APPNOTE.TXT 4.3.7).
            opened.seek(member.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", opened.read(4))
            start = member.header_offset + 30 + name_length + extra_length
            name = member.filename.removesuffix(".npy")
            found[name] = _header(file, name, opened, start)
    return found


def _header(file: RangedFile, name: str, opened: IO[bytes], start: int) -> _Array:
    opened.seek(start)
    version = np.lib.format.read_magic(opened)
    length = struct.unpack("<H" if version < (2, 0) else "<I", opened.read(2 if version < (2, 0) else 4))[0]
    told = ast.literal_eval(opened.read(length).decode("utf-8" if version >= (3, 0) else "latin1"))
    dtype = np.lib.format.descr_to_dtype(told["descr"])
    what = f"Array {name!r} of {file}" if name else str(file)
    if dtype.hasobject:
        raise InputError(f"{what} holds Python objects, which are not read. Write numbers.")
    if not told["shape"]:
        raise InputError(f"{what} is a single value; rows need a dimension.")
    if told["fortran_order"] and len(told["shape"]) > 1:
        raise InputError(f"{what} lies column by column. Write it with numpy.ascontiguousarray.")
    found = _Array(offset=opened.tell(), dtype=dtype, shape=tuple(told["shape"]))
    ends = found.offset + found.shape[0] * found.row_bytes
    if ends > file.size_bytes:
        raise InputError(
            f"{what} is cut short: its {found.shape[0]:,} rows end at byte {ends:,}, the file at "
            f"{file.size_bytes:,}. Write it again."
        )
    return found
