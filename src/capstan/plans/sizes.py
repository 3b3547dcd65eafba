"""Sizes and durations between people and programs."""

import re
from fractions import Fraction

from capstan.errors import UsageError

_MOST_DIGITS = 40
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}


def parse_bytes(text: str | int) -> int:
    """Bytes from `64MiB`, `1.5GiB`, `2GB` (decimal), `16g` (binary) or a plain number.

    Raises:
        UsageError: anything else.
    """
    if isinstance(text, int):
        text = str(text)
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS or len(match[1]) > _MOST_DIGITS:
        raise UsageError(f"{text[:40]!r} is not a size; write for example 64MiB, 1.5GiB or 2GB.")
    return int(Fraction(match[1]) * _UNITS[match[2].lower()])


def bytes_text(size_bytes: float) -> str:
    """A size for people: `1.31 GiB`."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size_bytes) >= scale:
            return f"{size_bytes / scale:.2f} {unit}"
    return f"{size_bytes:.0f} B"


def seconds_text(seconds: float) -> str:
    """A duration for people: `2 h 03 min`, `61.2 ms`."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms"
