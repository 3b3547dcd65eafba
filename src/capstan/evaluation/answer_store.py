"""Answers that have been given once: a journal and a cache in one file that is only appended to.

A line holds the key of a request (a digest of the model's identity and of everything that shapes the answer),
the result, and a checksum. After kill -9 the same command finds what was answered; a line whose checksum does
not fit is left aside and its request asked again.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from capstan.errors import InputError
from capstan.evaluation.models import Completion, Request, Result, Token
from capstan.storage import AppendLog

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
    } | ({"messages": request.messages} if request.messages else {})
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
        self._answers: dict[str, Result] = {}
        try:
            self._log = AppendLog(path, sync_every=_SYNC_EVERY)
        except InputError as error:
            raise InputError(f"Answers cannot be kept: {error} (--output)") from error
        self.num_damaged = int(self._log.torn_bytes > 0)
        for line in filter(None, self._log.kept):
            entry = _checked(line)
            if entry is None:
                self.num_damaged += 1
            else:
                self._answers[entry[0]] = entry[1]
        if self.num_damaged:
            logger.warning("%s: %d damaged lines are asked again", path, self.num_damaged)

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
        self._log.append([f"{digest} {body}".encode()])
        self._answers[key] = result

    def sync(self) -> None:
        """Wait until all answers are on disk."""
        self._log.sync()

    def close(self) -> None:
        """Sync and let go of the file."""
        self._log.close()

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
