"""Reading and writing byte ranges of files, whole or not at all, with a few requests in flight."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from capstan.errors import DoesNotFit, InputError

_REQUEST_BYTES = 4 << 20  # one request of this size keeps an NVMe disk busy; more of them run side by side
_NUM_THREADS = 4

_Move = Callable[[int, memoryview], None]


class FileRanges:
    """Moves byte ranges between one open file and memory.

    Reads leave nothing behind in the page cache (`POSIX_FADV_DONTNEED`): a model that is streamed again and
    again from disk must not quietly fill the memory that its user kept for something else.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name
        self._pool = ThreadPoolExecutor(max_workers=_NUM_THREADS, thread_name_prefix="capstan disk")

    def read(self, offset: int, target: torch.Tensor) -> None:
        """Fill `target` (flat uint8, on the host) from the bytes at `offset`."""
        view = target.numpy().data
        self._each(offset, view, self._read_piece)
        os.posix_fadvise(self._descriptor, offset, len(view), os.POSIX_FADV_DONTNEED)

    def write(self, offset: int, source: torch.Tensor) -> None:
        """Write all of `source` (flat uint8, on the host) at `offset`."""
        self._each(offset, source.numpy().data, self._write_piece)

    def _each(self, offset: int, view: memoryview, move: _Move) -> None:
        if len(view) <= _REQUEST_BYTES:
            move(offset, view)
            return
        pieces = [(offset + start, view[start : start + size]) for start, size in _requests(len(view))]
        for _ in self._pool.map(lambda piece: move(*piece), pieces):
            pass

    def _read_piece(self, offset: int, view: memoryview) -> None:
        while len(view):
            try:
                count = os.preadv(self._descriptor, [view], offset)
            except OSError as error:
                raise InputError(
                    f"Reading {len(view):,} bytes at {offset:,} of {self._name} failed: {error.strerror}. "
                    "Check the disk, or copy the file elsewhere."
                ) from error
            if count == 0:
                raise InputError(
                    f"{self._name} ends at byte {offset:,}, {len(view):,} bytes before the end of what was "
                    "to be read: it is truncated or was changed while in use. Copy it again."
                )
            offset, view = offset + count, view[count:]

    def _write_piece(self, offset: int, view: memoryview) -> None:
        while len(view):
            try:
                count = os.pwritev(self._descriptor, [view], offset)
            except OSError as error:
                raise DoesNotFit(
                    f"Writing {len(view):,} bytes to {self._name} failed: {error.strerror}. "
                    "Free space there or name another folder."
                ) from error
            offset, view = offset + count, view[count:]

    def close(self) -> None:
        """Close the file; running requests end first. Closing again does nothing."""
        self._pool.shutdown(wait=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _requests(size_bytes: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size_bytes, _REQUEST_BYTES):
        yield start, min(_REQUEST_BYTES, size_bytes - start)
