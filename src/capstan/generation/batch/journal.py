"""The output file of a batch job, which is its journal too.

Every line is appended with one write and synced; nothing is ever rewritten. Beside it lies `OUTPUT.job`,
which says what job it is: going on after kill -9 needs the same input, shard and model. A lock on that
file, released by the kernel when the process dies, keeps two processes from answering into one file.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from capstan.errors import InputError
from capstan.storage import AppendLog

_FORMAT = "capstan.batch-job"
_VERSION = 1


class Journal:
    """An output file that is only appended to.

    `answered` are the custom_ids that it holds already.

    Raises:
        InputError: the file belongs to another job, another process is at it, or it was changed by hand.
    """

    def __init__(self, output: Path, job: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.output = output
        self._lock = _locked(output)
        try:
            if overwrite:
                output.unlink(missing_ok=True)
            _claim(output, self._lock, dict(job), overwrite)
            self._log = AppendLog(output)
            try:
                self.answered = _answered(output, self._log.kept)
            except BaseException:
                self._log.close()
                raise
            self._log.kept.clear()  # answers may be many
        except BaseException:
            os.close(self._lock)
            raise

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append answers, all in one write, and wait until they are on disk."""
        self._log.append(map(_encoded, lines))

    def close(self) -> None:
        self._log.close()
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# Signs at which readers that do not know JSON end a line, as Python's `splitlines` does.
_LINE_ENDS = str.maketrans({sign: f"\\u{ord(sign):04x}" for sign in "\x85\u2028\u2029"})


def _encoded(line: Mapping[str, Any]) -> bytes:
    """A line of JSON. Escaped are signs that could end it, and halves of surrogate pairs, which UTF-8 cannot
    write."""
    try:
        return json.dumps(line, ensure_ascii=False).translate(_LINE_ENDS).encode()
    except UnicodeEncodeError:
        return json.dumps(line).encode()


def job_file(output: Path) -> Path:
    """The file beside an output that says what job it is of."""
    return output.with_name(output.name + ".job")


def _locked(output: Path) -> int:
    if output.is_dir():
        raise InputError(f"{output} is a folder. Name another --output, a file.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(job_file(output), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}. Name another --output.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise InputError(
            f"Another process is writing {output}. Wait for it, or name another --output."
        ) from None
    return descriptor


def _claim(output: Path, lock: int, job: dict[str, Any], overwrite: bool) -> None:
    """Make sure that the output is new, or of the same job."""
    wanted = {"format": _FORMAT, "version": _VERSION, **job}
    known = None if overwrite else _read_job(output, lock)
    if known is None:
        if output.exists() and output.stat().st_size:
            raise InputError(
                f"{output} exists and was not written by a batch job. Name another --output, or replace it "
                "with --overwrite."
            )
        _write_job(lock, wanted)
        return
    changed = changes(known, wanted)
    if changed:
        raise InputError(
            f"{output} belongs to a job with another {changed}; going on would mix two jobs. "
            "Name another --output, or start anew with --overwrite."
        )


def changes(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What tells one job from another, in words; options with their values. Empty if nothing does."""
    return " and ".join(
        f"{name} ({known.get(name) or 'none'}, not {wanted[name] or 'none'})" if name[:2] == "--" else name
        for name in wanted
        if known.get(name) != wanted[name]
    )


def job_of(output: Path) -> dict[str, Any] | None:
    """What job an output is of, or None if nothing beside it says so.

    Raises:
        InputError: what lies beside it is damaged.
    """
    path = job_file(output)
    if not path.exists():
        return None
    known = _parsed(path.read_bytes())
    if known is None:
        raise InputError(f"{path} is damaged, so it is not known what {output} answers.")
    return known


def _read_job(output: Path, lock: int) -> dict[str, Any] | None:
    text = os.pread(lock, 1 << 20, 0)
    known = _parsed(text)
    if text and known is None:
        raise InputError(
            f"{job_file(output)} is damaged, so it is not known what {output} answers. "
            "Name another --output, or start anew with --overwrite."
        )
    return known


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        job = json.loads(text)
    except ValueError:
        return None
    return job if isinstance(job, dict) and job.get("format") == _FORMAT else None


def _write_job(lock: int, job: dict[str, Any]) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(job).encode(), 0)
    os.fsync(lock)


def _answered(output: Path, lines: list[bytes]) -> set[str]:
    """The custom_ids in the file."""
    answered = set()
    for number, line in enumerate(lines, start=1):
        try:
            answered.add(str(json.loads(line)["custom_id"]))
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{output}, line {number}, is not an answer that this job wrote. Restore the file, or start "
                "anew with --overwrite."
            ) from None
    return answered
