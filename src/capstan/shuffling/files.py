"""A file whose ranges are read, here or anywhere that fsspec reaches, and which must not change meanwhile."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from capstan.errors import InputError, require_extra


class RangedFile:
    """A file by its path or its URL (`s3://bucket/rows.parquet`, `memory://rows.npy`, …).

    `identity` is its size and what says that it changed: the time and the number of a file here, what the
    store tells of a remote one. `bytes_read` counts what `read` brought.

    Raises:
        InputError: there is no such file, or it cannot be read.
        MissingExtra: a URL without fsspec.
    """

    def __init__(self, path: str | Path) -> None:
        self.name = str(path)
        self.is_remote = "://" in self.name
        self.bytes_read = 0
        if self.is_remote:
            require_extra("shuffling", "fsspec")
        self.identity = self._now()
        self.size_bytes = int(self.identity.partition("|")[0])

    def __str__(self) -> str:
        return self.name

    def open(self) -> IO[bytes]:
        """The whole file, to be closed by the caller."""
        with self._saying():
            if not self.is_remote:
                return open(self.name, "rb")
            opened: IO[bytes] = self._remote()[0].open(self.name, "rb")
            return opened

    def read(self, offset: int, size_bytes: int) -> bytes:
        """A range.

        Raises:
            InputError: the file is shorter, or it cannot be read.
        """
        with self._saying(), self.open() as file:
            file.seek(offset)
            data = file.read(size_bytes)
        if len(data) != size_bytes:
            raise self.changed()
        self.bytes_read += size_bytes
        return data

    def will_read(self, offset: int, size_bytes: int) -> None:
        """Have the kernel fetch a range in the background, where there is a kernel that can."""
        if not self.is_remote and hasattr(os, "posix_fadvise"):
            with self._saying(), open(self.name, "rb") as file:
                os.posix_fadvise(file.fileno(), offset, size_bytes, os.POSIX_FADV_WILLNEED)

    def require_same(self) -> None:
        """Raise `InputError` if the file is not the one that was opened."""
        if self._now() != self.identity:
            raise self.changed()

    def changed(self) -> InputError:
        """What to say when it is another file now."""
        return InputError(
            f"{self} changed while it was being read, so an epoch would mix two versions. Let nobody write "
            "it, and start again."
        )

    def _now(self) -> str:
        with self._saying():
            if not self.is_remote:
                status = os.stat(self.name)
                if os.path.isdir(self.name):
                    raise InputError(f"{self} is a folder; name a file.")
                return f"{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
            store, path = self._remote()
            told: dict[str, Any] = store.info(path)
            marks = [told.get(key) for key in ("ETag", "etag", "LastModified", "mtime", "created")]
            return f"{told['size']}|{marks}"

    def _remote(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        store, path = url_to_fs(self.name, use_listings_cache=False)
        return store, path

    @contextmanager
    def _saying(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise InputError(f"There is no file {self}.") from error
        except OSError as error:
            raise InputError(f"{self} cannot be read: {error.strerror or error}.") from error
