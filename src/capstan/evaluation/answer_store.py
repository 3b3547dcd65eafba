"""Answers that have been given once: a journal and a cache in one file that is only appended to.

A line holds the key of a request (a digest of the model's identity and of everything that shapes the answer),
the result, and a checksum. After kill -9 the same command finds what was answered; a line whose checksum does
not fit is left aside and its request asked again.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from capstan.errors import DoesNotFit, InputError
from capstan.evaluation.models import Completion, Request, Result, Token

logger = logging.getLogger(__name__)
_SYNC_EVERY = 64


def request_key(identity: str, request: Request) -> str:
    """The digest of what an answer depends on. Batches and placement are not part of it."""
    told = {
        "model": identity,
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "num_completions": request.num_completions,
        "stop": list(request.stop_sequences),
        "echo": request.echo,
        "continuation": request.continuation,
        "random": request.random,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def result_as_dict(result: Result) -> dict[str, Any]:
    """A result as plain data."""
    completions = [
        {"text": each.text, "tokens": [list(token) for token in each.tokens], "reason": each.finish_reason}
        for each in result.completions
    ]
    return {"completions": completions, "seconds": result.seconds, "batch_size": result.batch_size}


def result_from_dict(told: Mapping[str, Any]) -> Result:
    """A result from plain data."""
    completions = tuple(
        Completion(
            text=each["text"],
            tokens=tuple(Token(text, logprob) for text, logprob in each["tokens"]),
            finish_reason=each["reason"],
        )
        for each in told["completions"]
    )
    return Result(completions=completions, seconds=told["seconds"], batch_size=told["batch_size"])


class AnswerStore:
    """Answers by key, in memory and in a file.

        with AnswerStore(folder / "answers.jsonl") as store:
            store.add(key, result)

    `num_damaged` lines of the file were left aside.

    Raises:
        InputError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._answers: dict[str, Result] = {}
        self.num_damaged = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._read(path.read_bytes())
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(
                f"Answers cannot be kept in {path}: {error.strerror}. Name another --output."
            ) from error
        self._unsynced = 0
        if self.num_damaged:
            logger.warning("%s: %d damaged lines are asked again", path, self.num_damaged)

    def _read(self, data: bytes) -> None:
        lines = data.split(b"\n")
        torn = lines.pop()  # nothing after the last line break, unless a write was cut short
        if torn:
            self.num_damaged += 1
            self._end_torn_line()
        for line in lines:
            if not line:
                continue
            entry = _checked(line)
            if entry is None:
                self.num_damaged += 1
            else:
                self._answers[entry[0]] = entry[1]

    def _end_torn_line(self) -> None:
        with self._path.open("ab") as stream:
            stream.write(b"\n")

    def __contains__(self, key: object) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Result:
        return self._answers[key]

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, key: str, result: Result) -> None:
        """Keep an answer; it is on disk when `sync` returns, and now and then before.

        Raises:
            DoesNotFit: the disk is full.
        """
        body = json.dumps({"key": key, "result": result_as_dict(result)}, separators=(",", ":"))
        digest = hashlib.sha256(body.encode()).hexdigest()[:16]
        line = f"{digest} {body}\n".encode()
        try:
            while line:
                line = line[os.write(self._file, line) :]
            self._unsynced += 1
            if self._unsynced >= _SYNC_EVERY:
                self.sync()
        except OSError as error:
            raise DoesNotFit(
                f"Writing to {self._path} failed: {error.strerror}. Free space there and run the same "
                f"command again: "
                "it goes on where it stopped."
            ) from error
        self._answers[key] = result

    def sync(self) -> None:
        """Wait until all answers are on disk."""
        os.fsync(self._file)
        self._unsynced = 0

    def close(self) -> None:
        """Sync and let go of the file."""
        self.sync()
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _checked(line: bytes) -> tuple[str, Result] | None:
    digest, _, body = line.partition(b" ")
    if hashlib.sha256(body).hexdigest()[:16].encode() != digest:
        return None
    try:
        entry = json.loads(body)
        return str(entry["key"]), result_from_dict(entry["result"])
    except (ValueError, KeyError, TypeError):
        return None
