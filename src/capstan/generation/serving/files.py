"""Files that clients upload, and those that batches write: data beside what is known of it.

    FOLDER/files/file-0123….data    the bytes
    FOLDER/files/file-0123….json    OpenAI's file object
    FOLDER/batches/                 see batches.py

A file is there when its object is; both are written to temporary names, synced and renamed.
"""

import json
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from secrets import token_hex
from typing import IO, Any

from capstan.errors import DoesNotFit, InputError
from capstan.generation.serving.replies import Refused
from capstan.storage import open_atomically, write_atomically

Json = dict[str, Any]
_ID = re.compile(r"(file|batch)-[0-9a-f]{24}")


def new_id(kind: str) -> str:
    """A name that no other file or batch has."""
    return f"{kind}-{token_hex(12)}"


class FileStore:
    """The files of one server.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, folder: Path, *, limit: int) -> None:
        self.folder, self._files, self._limit = folder, folder / "files", limit
        try:
            self._files.mkdir(parents=True, exist_ok=True)
            for left_over in self._files.glob(".*"):
                left_over.unlink()
        except OSError as error:
            raise InputError(
                f"{folder} cannot be written: {error.strerror}. Name another --files."
            ) from error

    def add(self, source: IO[bytes], *, name: str, purpose: str, identity: str | None = None) -> Json:
        """Take a file over.

        Raises:
            Refused: it is too large, or there is no room.
        """
        identity = identity or new_id("file")
        data = self._files / f"{identity}.data"
        try:
            with open_atomically(data) as target:
                shutil.copyfileobj(source, target, 1 << 20)
                size = target.tell()
                if size > self._limit:
                    raise Refused(413, f"A file may have {self._limit:,} bytes; this one has {size:,}.")
            about = {
                "id": identity,
                "object": "file",
                "bytes": size,
                "created_at": int(time.time()),
                "filename": Path(name).name or "file",
                "purpose": purpose,
                "status": "processed",
            }
            write_object(self._files / f"{identity}.json", about)
        except (DoesNotFit, InputError, OSError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            reason = cause.strerror if isinstance(cause, OSError) else "the disk failed"
            raise Refused(507, f"The file could not be stored: {reason}.") from error
        return about

    def about(self, identity: str) -> Json:
        """The object of a file; `Refused` with 404 if there is none."""
        found = read_object(self._files / f"{identity}.json") if is_id(identity, "file") else None
        if found is None:
            raise Refused(404, f"There is no file {identity!r} here.", param="file_id")
        return found

    def data(self, identity: str) -> Path:
        """Where a file's bytes lie."""
        self.about(identity)
        return self._files / f"{identity}.data"

    def remove(self, identity: str) -> None:
        """Forget a file."""
        self.about(identity)
        (self._files / f"{identity}.json").unlink()
        (self._files / f"{identity}.data").unlink(missing_ok=True)

    def objects(self) -> list[Json]:
        """All files, the newest first."""
        return newest_first(self._files.glob("file-*.json"))


def is_id(text: str, kind: str) -> bool:
    """Whether `text` is a name that `new_id` makes: nothing else ever becomes part of a path."""
    found = _ID.fullmatch(text)
    return found is not None and found[1] == kind


def newest_first(paths: Iterable[Path]) -> list[Json]:
    """The objects in these files."""
    found = [each for path in paths if (each := read_object(path)) is not None]
    return sorted(found, key=lambda each: (each["created_at"], each["id"]), reverse=True)


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that it is there whole or not at all."""
    write_atomically(path, json.dumps(content))


def read_object(path: Path) -> Json | None:
    """JSON that `write_object` wrote, or None."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
