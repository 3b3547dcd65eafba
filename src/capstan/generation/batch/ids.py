"""The lines of a batch file and the custom_id of each, known before any model is asked.

What answers a line is found by its custom_id. A line without one is called for its number, and so is a second
line that wants an id which was used before: so every machine that reads the file gives it the same ids.
"""

import json
from collections.abc import Callable, Container, Iterable, Iterator, Set
from pathlib import Path
from typing import Any, NamedTuple

from capstan.errors import InputError

_NAMELESS = "line-"  # and its number: the id of a line that states none


class BatchLine(NamedTuple):
    """A line that is not empty: `raw` is what it holds, or `trouble` why that is not a request."""

    number: int
    custom_id: str
    raw: dict[str, Any]
    trouble: str | None


def text_lines(
    path: Path, on_bytes: Callable[[bytes], object] = len, *, called: str | None = None
) -> Iterator[str]:
    """The lines of a UTF-8 file, with or without a byte order mark. `on_bytes` is given every byte; `called`
    is the file's name in errors, where its path is nobody's business.

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
            f"{called or path} cannot be read: {error.strerror}. Name a JSONL file with --input."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{called or path} is not UTF-8 text (byte {start + error.start}); is it compressed?"
        ) from error


def line_names(lines: Iterable[str]) -> frozenset[str]:
    """The ids that lines state and that look like those of lines without one."""
    named = (_named(line, number) for number, line in enumerate(lines) if f'"{_NAMELESS}' in line)
    return frozenset(each.custom_id for each in named if each.raw)


def batch_lines(lines: Iterable[str], taken: Set[str] = frozenset()) -> Iterator[BatchLine]:
    """Number and name every line; empty ones are counted and passed over. No two have the same id.

    What is `taken`, as `line_names` finds it, is for the lines that state it.
    """
    first_use: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        named = _named(line, number)
        if named.custom_id in first_use:
            used = f"custom_id {named.custom_id!r} was used on line {first_use[named.custom_id]}"
            name = _unused(f"{_NAMELESS}{number}", first_use, taken)
            named = BatchLine(number, name, {}, f"{used}; give every line its own.")
        elif not _states_id(named):
            named = named._replace(custom_id=_unused(named.custom_id, first_use, taken))
        first_use[named.custom_id] = number
        yield named


def _named(line: str, number: int) -> BatchLine:
    name = f"{_NAMELESS}{number}"
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


def _states_id(line: BatchLine) -> bool:
    return line.raw.get("custom_id") == line.custom_id


def _unused(name: str, *used: Container[str]) -> str:
    while any(name in each for each in used):
        name += "-again"
    return name
