"""Reading and writing byte ranges of files, whole or not at all, with a few requests in flight."""

import os
from collections.abc import Iterator
from itertools import pairwise

import torch

from capstan.errors import DoesNotFit, InputError
from capstan.hardware.direct_io import BLOCK_BYTES, SECTOR_BYTES
from capstan.storage.direct_file import DirectFile
from capstan.storage.disk_requests import DiskRequests

_REQUEST_BYTES = BLOCK_BYTES  # as the probe's requests are, so that the rate it measures is reached here


class FileRanges:
    """Moves byte ranges between one open file and memory.

    Ranges of more than one request bypass the page cache where the file system allows it, and of what else is
    read nothing stays there (`POSIX_FADV_DONTNEED`): a model that is streamed again and again from disk must
    not quietly fill the memory that its user kept for something else.

    `requests` may be shared by files that are closed together.
    """

    def __init__(self, descriptor: int, name: str, requests: DiskRequests | None = None) -> None:
        self._descriptor = descriptor
        self._direct = DirectFile(descriptor)
        self._name = name
        self._requests = requests or DiskRequests()

    def read(self, offset: int, target: torch.Tensor) -> None:
        """Fill `target` (flat uint8, on the host) from the bytes at `offset`."""
        view = target.numpy().data
        if len(view) <= _REQUEST_BYTES:
            self._read_piece(offset, view)
        else:
            self._requests.move(self._read_piece, _pieces(offset, view))
        os.posix_fadvise(self._descriptor, offset, len(view), os.POSIX_FADV_DONTNEED)

    def write(self, offset: int, source: torch.Tensor) -> None:
        """Write all of `source` (flat uint8, on the host) at `offset`."""
        view = source.numpy().data
        if len(view) <= _REQUEST_BYTES:
            self._write_piece(offset, view)
            return
        self._requests.move(self._write_piece, _pieces(offset, view))
        # What could not go directly begins to be written back now, so that it does not pile up in memory.
        os.posix_fadvise(self._descriptor, offset, len(view), os.POSIX_FADV_DONTNEED)

    def _read_piece(self, offset: int, view: memoryview, buffer: memoryview | None = None) -> None:
        """Directly where there is a buffer; what is refused or beyond the end, the ordinary way."""
        while len(view):
            try:
                count = 0 if buffer is None else self._direct.read(offset, view, buffer)
                count = count or os.preadv(self._descriptor, [view], offset)
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

    def _write_piece(self, offset: int, view: memoryview, buffer: memoryview | None = None) -> None:
        """Directly where there is a buffer; what is refused or no whole sector, the ordinary way."""
        while len(view):
            try:
                count = 0 if buffer is None else self._direct.write(offset, view, buffer)
                count = count or os.pwritev(self._descriptor, [view], offset)
            except OSError as error:
                raise DoesNotFit(
                    f"Writing {len(view):,} bytes to {self._name} failed: {error.strerror}. "
                    "Free space there or name another folder."
                ) from error
            offset, view = offset + count, view[count:]

    def close(self) -> None:
        """Close the file; running requests end first. Closing again does nothing."""
        self._requests.close()
        self._direct.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _pieces(offset: int, view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Where each request starts, and its memory: whole sectors but for the edges, so that all but those can
    be written directly."""
    end = offset + len(view)
    first = min(-(-offset // SECTOR_BYTES) * SECTOR_BYTES, end)
    last = max(first, end // SECTOR_BYTES * SECTOR_BYTES)
    for start, stop in pairwise([offset, *range(first, last, _REQUEST_BYTES), last, end]):
        if start < stop:
            yield start, view[start - offset : stop - offset]
