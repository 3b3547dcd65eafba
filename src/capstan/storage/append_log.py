"""A file that is only appended to, line by line: what long work leaves behind so that it can go on."""

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from capstan.errors import DoesNotFit, InputError
from capstan.storage.atomic import make_folder, not_written


class AppendLog:
    """Lines of bytes in a file. Each call of `append` is one write; whole lines survive kill -9.

        with AppendLog(folder / "journal.jsonl") as log:
            for line in log.kept:
                ...
            log.append([b'{"step": 1}'])

    `kept` are the lines that were there when it was opened, without their line breaks. A last line that was
    cut short is removed then; `torn_bytes` is how long it was. The file is locked against other writers as
    long as it is open, and the kernel lets go of it when the process dies. After `sync_every` appended lines
    it waits for the disk: 1 promises every line, more promise all but the last few after a loss of power.

    Raises:
        InputError: the file cannot be read or written, or another process is writing it.
    """

    def __init__(self, path: Path, *, sync_every: int = 1) -> None:
        self.path = path
        self._sync_every, self._unsynced = sync_every, 0
        try:
            make_folder(path.parent)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise not_written(path, error) from error
        try:
            self._lock()
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            self.torn_bytes = len(data) - whole
            if self.torn_bytes:
                os.ftruncate(self._file, whole)
            self.kept: list[bytes] = data[:whole].split(b"\n")[:-1]
        except OSError as error:
            os.close(self._file)
            raise not_written(path, error) from error
        except BaseException:
            os.close(self._file)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"Another process is writing {self.path}. Wait for it, or name another place."
            ) from None

    def append(self, lines: Iterable[bytes]) -> None:
        """Append lines, all in one write.

        Raises:
            DoesNotFit: writing failed; the disk is full.
        """
        lines = list(lines)
        assert not any(b"\n" in line for line in lines), "a line has no line break"
        if not lines:
            return
        data = memoryview(b"".join(line + b"\n" for line in lines))
        try:
            while len(data):
                data = data[os.write(self._file, data) :]
            self._unsynced += len(lines)
            if self._unsynced >= self._sync_every:
                self.sync()
        except OSError as error:
            raise DoesNotFit(
                f"Writing to {self.path} failed: {error.strerror}. Free space there and run the same command "
                "again: it goes on where it stopped."
            ) from error

    def sync(self) -> None:
        """Wait until all lines are on disk."""
        os.fsync(self._file)
        self._unsynced = 0

    def close(self) -> None:
        """Sync and let go of the file."""
        try:
            self.sync()
        finally:
            os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
