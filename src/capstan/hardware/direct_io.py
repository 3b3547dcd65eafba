"""A temporary file that bypasses the page cache where the file system allows it.

The file has no name: it is unlinked as soon as it is open, so its space is given back even when the
process is killed. Where direct I/O is refused (memory file systems, some container and network ones)
what was written is flushed and dropped from the page cache instead.
"""

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from capstan.errors import DeviceError
from capstan.hardware.huge_pages import huge_page_memory

BLOCK_BYTES = 2**20
SECTOR_BYTES = 4096
NUM_REQUESTS = 8
REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)


class UnnamedFile:
    """One open file without a name, written and read by several threads, a block each at a time."""

    def __init__(self, descriptor: int, *, is_direct: bool) -> None:
        self.is_direct = is_direct
        self._descriptor = descriptor
        self._buffers = request_buffers()
        for buffer in self._buffers:
            buffer[:] = os.urandom(BLOCK_BYTES)  # a disk may compress what repeats
        self._pool = ThreadPoolExecutor(NUM_REQUESTS)

    def write(self, size_bytes: int) -> None:
        """Write the first `size_bytes`, a multiple of a block, and wait until the disk has them."""
        self._in_lanes(lambda buffer, offset: os.pwritev(self._descriptor, [buffer], offset), size_bytes)
        os.fsync(self._descriptor)

    def read(self, size_bytes: int) -> None:
        """Read the first `size_bytes`, a multiple of a block."""
        self._in_lanes(lambda buffer, offset: os.preadv(self._descriptor, [buffer], offset), size_bytes)

    def write_sector(self, offset: int) -> None:
        """Write one sector and wait until the disk has it."""
        with self._buffers[0][:SECTOR_BYTES] as sector:
            _require_all(os.pwritev(self._descriptor, [sector], offset), SECTOR_BYTES)
        os.fsync(self._descriptor)

    def read_sector(self, offset: int) -> None:
        """Read one sector."""
        with self._buffers[0][:SECTOR_BYTES] as sector:
            _require_all(os.preadv(self._descriptor, [sector], offset), SECTOR_BYTES)

    def forget(self) -> None:
        """Drop what the page cache holds of this file, so that the next read comes from the disk."""
        if not self.is_direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Wait for what is under way and give the space back."""
        self._pool.shutdown()
        os.close(self._descriptor)
        for buffer in self._buffers:
            buffer.release()

    def _in_lanes(self, move: Callable[[memoryview, int], int], size_bytes: int) -> None:
        """Every thread moves each `NUM_REQUESTS`-th block, so that many requests are in flight."""

        def lane(first: int) -> None:
            for offset in range(first * BLOCK_BYTES, size_bytes, NUM_REQUESTS * BLOCK_BYTES):
                _require_all(move(self._buffers[first], offset), BLOCK_BYTES)

        for done in [self._pool.submit(lane, first) for first in range(NUM_REQUESTS)]:
            done.result()


def request_buffers() -> list[memoryview]:
    """A block of page-aligned memory for each request, as direct I/O demands.

    They lie in huge pages: a block that is scattered over small ones costs a disk many transfers.
    """
    memory = huge_page_memory(NUM_REQUESTS * BLOCK_BYTES)
    return [memory[start : start + BLOCK_BYTES] for start in range(0, len(memory), BLOCK_BYTES)]


@contextmanager
def unnamed_file(folder: Path) -> Iterator[UnnamedFile]:
    """A file in `folder` for the duration; `DeviceError` when the disk is full or cannot be written."""
    try:
        with ExitStack() as opened:
            file = _open_direct(folder) or UnnamedFile(_open_and_unlink(folder, 0), is_direct=False)
            opened.callback(file.close)
            yield file
    except OSError as error:
        raise DeviceError(
            f"The disk probe cannot write and read a file in {folder} ({error.strerror or error}). "
            "Name a writable folder with free space on the disk to measure: --disk FOLDER or disk_dir=…"
        ) from error


def _open_direct(folder: Path) -> UnnamedFile | None:
    """The file with direct I/O, or None where it is refused when opening or at the first write."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return None
    try:
        file = UnnamedFile(_open_and_unlink(folder, flag), is_direct=True)
    except OSError as error:
        if error.errno in REFUSALS:
            return None
        raise
    try:
        file.write_sector(0)
    except OSError as error:
        file.close()
        if error.errno in REFUSALS:
            return None
        raise
    return file


def _open_and_unlink(folder: Path, extra_flags: int) -> int:
    path = folder / f".capstan-probe-{secrets.token_hex(8)}"
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | extra_flags, 0o600)
    finally:
        path.unlink(missing_ok=True)


def _require_all(moved: int, wanted: int) -> None:
    if moved != wanted:
        raise OSError(errno.EIO, f"only {moved} of {wanted} bytes were moved")
