"""Scratch space on disk that leaves nothing behind."""

import os
import tempfile
from pathlib import Path
from typing import Self

import torch

from capstan.errors import DoesNotFit, InputError
from capstan.storage.file_ranges import FileRanges
from capstan.storage.slab import aligned


class DiskSlab:
    """A file of an exact size in `folder`, already unlinked: it vanishes with the process, also after
    kill -9, and two processes never share a name."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.used_bytes = 0
        self._ranges = FileRanges(_reserve(folder, size_bytes), f"the scratch file in {folder}")

    def take(self, size_bytes: int) -> int:
        """The offset of the next `size_bytes` bytes."""
        offset = self.used_bytes
        if offset + size_bytes > self.size_bytes:
            raise DoesNotFit(
                f"The scratch file has {self.size_bytes:,} bytes, {offset:,} in use; "
                f"{size_bytes:,} more do not fit."
            )
        self.used_bytes = min(aligned(offset + size_bytes), self.size_bytes)
        return offset

    def read(self, offset: int, target: torch.Tensor) -> None:
        """Fill `target` (flat uint8, on the host)."""
        self._ranges.read(offset, target)

    def write(self, offset: int, source: torch.Tensor) -> None:
        """Write `source` (flat uint8, on the host)."""
        self._ranges.write(offset, source)

    def close(self) -> None:
        """Give the space back."""
        self._ranges.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _reserve(folder: Path, size_bytes: int) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix="capstan-", suffix=".scratch", dir=folder)
    except OSError as error:
        raise InputError(
            f"No scratch file can be made in {folder}: {error.strerror}. Name a folder that can be written."
        ) from error
    os.unlink(name)
    try:
        if size_bytes:
            os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        os.close(descriptor)
        raise DoesNotFit(
            f"{folder} cannot hold a scratch file of {size_bytes:,} bytes: {error.strerror}. "
            "Free space there, or name another folder with --disk."
        ) from error
    return descriptor
