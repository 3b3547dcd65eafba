"""Direct I/O on a file that is open already: past the page cache, whatever the offset and the memory.

A direct request must begin and end at sectors, in the file and in memory. Tensors do neither: a safetensors
header has any length, and pieces of a slab start at multiples of 64. So the sectors around what is wanted
go through an aligned buffer; a copy within memory costs little beside a disk.
"""

import fcntl
import os
import threading

import numpy as np

from capstan.hardware.direct_io import REFUSALS, SECTOR_BYTES


class DirectFile:
    """A second way into the file behind `descriptor`, for requests that bypass the page cache.

    Where that is refused (memory file systems, some container and network ones) every request moves nothing,
    and the caller takes the ordinary way. What one way has written the other reads: Linux writes back, or
    drops, what the page cache holds of a range before the range is moved directly.
    """

    def __init__(self, descriptor: int) -> None:
        self._ordinary = descriptor
        self._direct: int | None = None
        self._is_refused = False
        self._opening = threading.Lock()

    def read(self, offset: int, target: memoryview, buffer: memoryview) -> int:
        """How many bytes of `target` were filled by way of `buffer`: as many as it holds and the file has,
        none where direct I/O is refused."""
        skipped = offset % SECTOR_BYTES
        sectors = buffer[: _whole_sectors(skipped + len(target) + SECTOR_BYTES - 1)]
        count = 0
        descriptor = self._descriptor()
        if descriptor is not None:
            try:
                count = os.preadv(descriptor, [sectors], offset - skipped)
            except OSError as error:
                self._accept_refusal(error)
        wanted = sectors[skipped:count][: len(target)]
        _copy(target[: len(wanted)], wanted)
        return len(wanted)

    def write(self, offset: int, source: memoryview, buffer: memoryview) -> int:
        """How many bytes of `source` were written by way of `buffer`: whole sectors, as many as it holds;
        none where direct I/O is refused."""
        sectors = buffer[: _whole_sectors(len(source))]
        descriptor = self._descriptor()
        if offset % SECTOR_BYTES or not len(sectors) or descriptor is None:
            return 0
        _copy(sectors, source[: len(sectors)])
        try:
            return os.pwritev(descriptor, [sectors], offset)
        except OSError as error:
            self._accept_refusal(error)
            return 0

    def close(self) -> None:
        """Close the second way; the first stays open. Closing again does nothing."""
        with self._opening:
            self._is_refused = True
            if self._direct is not None:
                os.close(self._direct)
                self._direct = None

    def _descriptor(self) -> int | None:
        """Opened when first needed, as many a file is never moved in large pieces."""
        with self._opening:
            if self._direct is None and not self._is_refused:
                self._direct = _reopened(self._ordinary)
                self._is_refused = self._direct is None
            return None if self._is_refused else self._direct

    def _accept_refusal(self, error: OSError) -> None:
        """Some file systems refuse only when they are to move something."""
        if error.errno not in REFUSALS:
            raise error
        self._is_refused = True


def _reopened(descriptor: int) -> int | None:
    """The same file with direct I/O; found by its descriptor, since a scratch file has no name."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return None
    access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    try:
        return os.open(f"/proc/self/fd/{descriptor}", access | os.O_CLOEXEC | flag)
    except OSError:  # refused, or no /proc; where the file itself is at fault, the ordinary way will say so
        return None


def _copy(target: memoryview, source: memoryview) -> None:
    """By numpy, which lets go of Python's lock meanwhile; torch would start more threads for each of ours."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def _whole_sectors(size_bytes: int) -> int:
    return size_bytes // SECTOR_BYTES * SECTOR_BYTES
