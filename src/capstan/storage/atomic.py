"""Files that are there whole or not at all.

A file is written under another name in the same folder, synced, renamed over the old one, and the folder is
synced too: a reader, and a machine that lost power, finds the old file or the new one.
"""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from capstan.errors import CapstanError, DoesNotFit, InputError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a whole file; text as UTF-8.

    Raises:
        DoesNotFit: the disk is full.
        InputError: the place cannot be written.
    """
    with open_atomically(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def open_atomically(path: Path) -> Iterator[IO[bytes]]:
    """A file to write into, which takes its name when the block ends; if the block fails, nothing changes.

        with open_atomically(folder / "model.pt") as file:
            torch.save(model, file)

    Raises:
        DoesNotFit: the disk is full.
        InputError: the place cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with _saying(path):
        make_folder(path.parent)
        opened = unfinished.open("xb")
    try:
        with opened as file:
            try:
                yield file
            except OSError as error:  # of this file, unless the block reads others
                if error.errno in _NO_ROOM:
                    raise not_written(path, error) from error
                raise
            with _saying(path):
                file.flush()
                os.fsync(file.fileno())
        with _saying(path):
            unfinished.replace(path)
            sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless they are there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # it is there, but it is a file
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def not_written(path: Path, error: OSError) -> CapstanError:
    """What to say when writing to `path` failed."""
    if error.errno in _NO_ROOM:
        return DoesNotFit(
            f"Writing {path} failed: {error.strerror}. Free space there, or name another place."
        )
    return InputError(f"{path} cannot be written: {error.strerror}. Name another place.")


@contextmanager
def _saying(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise not_written(path, error) from error
