"""Memory of embedding rows: one preallocated slab, in RAM or mapped from a file without a name."""

import errno
import mmap
import os
import tempfile
from pathlib import Path

import numpy as np

from capstan.errors import DoesNotFit, InputError
from capstan.hardware.huge_pages import huge_page_memory


def row_memory(num_rows: int, stride: int, folder: Path | None) -> np.ndarray:
    """float32 `[num_rows, stride]`, zeros. In RAM a page takes memory when it is first written.

    With `folder` the rows lie in a file there, of which the system keeps in memory what it likes; its whole
    size is reserved at once, so that a full disk is found here and not in the middle of training. The file
    has no name: it goes with the process, however that ends.

    Raises:
        DoesNotFit: there is not so much memory or disk.
        InputError: the folder cannot be written.
    """
    size_bytes = 4 * num_rows * stride
    wanted = f"A table of {num_rows:,} rows of {4 * stride} bytes needs {size_bytes:,} bytes"
    if folder is None:
        try:
            memory: memoryview | mmap.mmap = huge_page_memory(size_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise DoesNotFit(
                f"{wanted} of memory, which the system refused: {error}. Lower capacity, or name a folder "
                "for the rows."
            ) from error
    else:
        memory = _file_memory(folder, size_bytes, wanted)
    return np.frombuffer(memory, dtype=np.float32).reshape(num_rows, stride)


def _file_memory(folder: Path, size_bytes: int, wanted: str) -> mmap.mmap:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
            return mmap.mmap(file.fileno(), size_bytes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM):
            raise DoesNotFit(
                f"{wanted} in {folder}, which failed: {error.strerror}. Free space there, lower capacity, or "
                "name another folder."
            ) from error
        raise InputError(
            f"Rows cannot be kept in {folder}: {error.strerror}. Name a folder that can be written."
        ) from error
