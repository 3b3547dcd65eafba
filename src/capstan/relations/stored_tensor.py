"""A tensor in a .npy file, read and written tile by tile with plain positioned reads.

A memory map would be shorter, but its pages count as the process's memory while they are mapped, and each
page fault maps its neighbours too: a budget could not be kept.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from capstan.errors import InputError

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """The shape of a .npy file and where its elements begin; holds no open file."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    is_fortran: bool = False

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.path.name} {' × '.join(map(str, self.shape)) or 'scalar'} {self.dtype}"

    def read(self, box: Box) -> np.ndarray:
        """The elements between (start, stop) in each dimension, as a new array.

        Raises:
            InputError: the file ends before them.
        """
        if self.is_fortran:
            return self._read_rows(self.shape[::-1], box[::-1]).T
        return self._read_rows(self.shape, box)

    def _read_rows(self, shape: tuple[int, ...], box: Box) -> np.ndarray:
        found = np.empty([stop - start for start, stop in box], self.dtype)
        into = found.reshape(-1).view(np.uint8).data
        file = os.open(self.path, os.O_RDONLY)
        try:
            for at, position, count in self._runs(shape, box):
                self._fill(file, into[at : at + count], position)
        finally:
            os.close(file)
        return found

    def _fill(self, file: int, into: memoryview, position: int) -> None:
        done = 0
        while done < len(into):
            count = os.preadv(file, [into[done:]], position + done)
            if count == 0:
                raise InputError(f"{self.path} ends at byte {position + done}; it was cut short.")
            done += count

    def write(self, box: Box, array: np.ndarray) -> None:
        """Put `array` between (start, stop) in each dimension."""
        assert not self.is_fortran
        source = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        file = os.open(self.path, os.O_WRONLY)
        try:
            for at, position, count in self._runs(self.shape, box):
                done = 0
                while done < count:
                    done += os.pwrite(file, source[at + done : at + count], position + done)
        finally:
            os.close(file)

    def _runs(self, shape: tuple[int, ...], box: Box) -> Iterator[tuple[int, int, int]]:
        """(place in the tile, place in the file, count) in bytes of every contiguous run."""
        itemsize = self.dtype.itemsize
        first = first_of_run(shape, tuple(stop - start for start, stop in box))
        strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
        run = prod(stop - start for start, stop in box[first:])
        inner = sum(start * stride for (start, _), stride in zip(box[first:], strides[first:], strict=True))
        offsets = np.full((), inner, np.int64)
        for (start, stop), stride in zip(box[:first], strides[:first], strict=True):
            offsets = offsets[..., None] + np.arange(start, stop) * stride
        for number, offset in enumerate(offsets.reshape(-1).tolist()):
            yield number * run * itemsize, self.offset + offset * itemsize, run * itemsize


def first_of_run(shape: tuple[int, ...], tile: tuple[int, ...]) -> int:
    """The first dimension that belongs to a contiguous run of a tile in a row-major tensor."""
    first = max(len(shape) - 1, 0)
    while first > 0 and tile[first] == shape[first]:
        first -= 1
    return first


def open_npy(path: Path | str) -> StoredTensor:
    """Read the header of a .npy file; no elements.

    Raises:
        InputError: the file is missing, no .npy, cut short, empty, or of elements that are no numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    with path.open("rb") as file:
        try:
            version = npy.read_magic(file)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, is_fortran, dtype = read_header(file)
        except ValueError as error:
            why = str(error).rstrip(".")
            raise InputError(f"{path} is no .npy file: {why}. Write it with numpy.save.") from error
        offset = file.tell()
    if dtype.kind not in "biufc" or not dtype.isnative:
        raise InputError(
            f"{path} has elements of type {dtype}; numbers of this machine's byte order are needed."
        )
    if 0 in shape:
        raise InputError(f"{path} has shape {shape}: no dimension may be empty.")
    stored = StoredTensor(
        path=path, shape=shape, dtype=dtype, offset=offset, is_fortran=is_fortran and len(shape) > 1
    )
    found = path.stat().st_size
    if found < offset + stored.nbytes:
        raise InputError(
            f"{path} is cut short: shape {shape} of {dtype} needs {offset + stored.nbytes} bytes, "
            f"but the file has {found}."
        )
    return stored


def create_npy(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> StoredTensor:
    """A .npy file of the right size, its elements zero until they are written.

    Raises:
        InputError: its folder does not exist.
    """
    if not path.parent.is_dir():
        raise InputError(f"There is no folder {path.parent} for {path.name}.")
    with path.open("wb") as file:
        header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(file, header)
        offset = file.tell()
        file.truncate(offset + prod(shape) * dtype.itemsize)
    return StoredTensor(path=path, shape=shape, dtype=dtype, offset=offset)
