"""The fields of one JSON object, read with their types checked and errors that name the place.

Hand-written, so that reading a machine's profile needs nothing beyond the standard library.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from capstan.errors import InputError


def parse_object(text: str, *, source: str) -> dict[str, Any]:
    """The JSON object in `text`; truncated text, NaN, infinity and repeated keys are refused."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except ValueError as error:
        raise InputError(
            f"{source} should hold one JSON object but it is truncated or damaged ({error}). "
            "Delete it and probe again."
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{source} should hold one JSON object but holds a {type(value).__name__}.")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no measured value")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a field comes twice")
    return record


class Fields:
    """A reader of one object. Each method takes one field; `require_no_more` refuses what is left."""

    def __init__(self, record: Mapping[str, Any], where: str) -> None:
        self._left = dict(record)
        self._where = where

    def require_format(self, name: str, version: int) -> None:
        """Refuse an object that is something else, or of a version this library does not know."""
        found = (self._left.pop("format", None), self._left.pop("version", None))
        if found[0] != name:
            raise InputError(f"{self._where} should have format {name!r} but has {found[0]!r}.")
        if type(found[1]) is not int or found[1] != version:
            raise InputError(
                f"{self._where} is version {found[1]!r} of {name}; this library reads version {version}. "
                "Probe again, or use the library that wrote it."
            )

    def text(self, key: str) -> str:
        return str(self._take(key, "a text", lambda value: isinstance(value, str)))

    def integer(self, key: str) -> int:
        return int(self._take(key, "a whole number", _is_integer))

    def number(self, key: str) -> float:
        return float(self._take(key, "a finite number", _is_number))

    def number_or_none(self, key: str) -> float | None:
        value = self._take(key, "a finite number or null", lambda v: v is None or _is_number(v))
        return None if value is None else float(value)

    def texts(self, key: str) -> tuple[str, ...]:
        return tuple(self._take(key, "a list of texts", lambda v: _is_list_of(v, str)))

    def texts_by_name(self, key: str) -> dict[str, str]:
        value = self._take(key, "an object of texts", lambda v: _is_object_of(v, _is_text))
        return dict(value)

    def numbers_by_name(self, key: str) -> dict[str, float]:
        value = self._take(key, "an object of finite numbers", lambda v: _is_object_of(v, _is_number))
        return {name: float(number) for name, number in value.items()}

    def objects(self, key: str) -> list["Fields"]:
        records = self._take(key, "a list of objects", lambda v: _is_list_of(v, dict))
        return [Fields(record, f"{self._where}, {key}[{i}]") for i, record in enumerate(records)]

    def require_no_more(self) -> None:
        if self._left:
            raise InputError(f"{self._where} has unknown fields: {', '.join(sorted(map(str, self._left)))}.")

    def _take(self, key: str, wanted: str, fits: Callable[[Any], bool]) -> Any:
        if key not in self._left:
            raise InputError(f"{self._where} lacks the field {key!r}, which should be {wanted}.")
        value = self._left.pop(key)
        if not fits(value):
            raise InputError(f"{self._where}: {key!r} should be {wanted} but is {value!r:.80}.")
        return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_integer(value: Any) -> bool:
    # bool is an int in Python, but true is no number of bytes; past 64 bits nothing was measured.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or _is_integer(value)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _is_object_of(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(fits(item) for item in value.values())
