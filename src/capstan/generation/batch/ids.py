"""The lines of a batch file and the custom_id of each, known before any model is asked.

What answers a line is found by its custom_id. A line without one is called for its number, and so is a second
line that wants an id which was used before: so every machine that reads the file gives it the same ids.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from capstan.errors import InputError


class BatchLine(NamedTuple):
    """A line that is not empty: `raw` is what it holds, or `trouble` why that is not a request."""

    number: int
    custom_id: str
    raw: dict[str, Any]
    trouble: str | None


def text_lines(path: Path, on_bytes: Callable[[bytes], object]) -> Iterator[str]:
    """The lines of a UTF-8 file, with or without a byte order mark. `on_bytes` is given every byte.

    Raises:
        InputError: there is no such file, or it is not text.
    """
    start = 0
    try:
        with path.open("rb") as file:
            for data in file:
                on_bytes(data)
                yield data.decode("utf-8" if start else "utf-8-sig").removesuffix("\n")
                start += len(data)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}. Name a JSONL file with --input."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {start + error.start}); is it compressed?"
        ) from error


def batch_lines(lines: Iterable[str]) -> Iterator[BatchLine]:
    """Number and name every line; empty ones are counted and passed over. No two have the same id."""
    first_use: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        named = _named(line, number)
        if named.custom_id in first_use:
            used = f"custom_id {named.custom_id!r} was used on line {first_use[named.custom_id]}"
            named = BatchLine(
                number, _unused(f"line-{number}", first_use), {}, f"{used}; give every line its own."
            )
        first_use[named.custom_id] = number
        yield named


def _named(line: str, number: int) -> BatchLine:
    name = f"line-{number}"
    try:
        raw = json.loads(line)
    except RecursionError:
        return BatchLine(number, name, {}, "it is nested too deeply to be a request")
    except ValueError as error:
        return BatchLine(number, name, {}, str(error))
    if not isinstance(raw, dict):
        return BatchLine(number, name, {}, f"a JSON object was wanted, not {type(raw).__name__}")
    stated = raw.get("custom_id")
    return BatchLine(number, stated if isinstance(stated, str) and stated else name, raw, None)


def _unused(name: str, used: dict[str, int]) -> str:
    while name in used:
        name += "-again"
    return name
