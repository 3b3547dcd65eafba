"""What a task makes of an answer before it is judged: steps of a pipeline, by name.

A step takes all answers to a question and gives as many, or fewer. The pipeline's first answer is judged.

Source: lm-evaluation-harness 0.4, `filters/`; names and arguments are its.
"""

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from inspect import signature
from typing import Any

from capstan.errors import InputError, unknown_name

Step = Callable[[Sequence[str], Mapping[str, Any]], list[str]]
"""Takes answers and the question's document (`extra` of its instance)."""

_NUMBER_AFTER_HASHES = r"#### (\-?[0-9\.\,]+)"
_INVALID = "[invalid]"


def regex(regex_pattern: str = _NUMBER_AFTER_HASHES, group_select: int = 0, fallback: str = _INVALID) -> Step:
    """The `group_select`-th match in each answer, or `fallback`."""
    pattern = _compiled(regex_pattern)

    def select(answer: str) -> str:
        found = _match(pattern, answer, group_select)
        return str(fallback) if found is None else found

    return lambda answers, _: [select(each) for each in answers]


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise InputError(f"{pattern!r} is no regular expression: {error}.") from error


def _match(pattern: re.Pattern[str], text: str, select: int) -> str | None:
    """A match's group, of several groups the first that is not empty; None where there is none."""
    found = pattern.findall(text)
    if not -len(found) <= select < len(found):
        return None
    if isinstance(found[select], tuple):
        return next((str(group).strip() for group in found[select] if group), None)
    return str(found[select]).strip()


def multi_choice_regex(
    regex_pattern: str = _NUMBER_AFTER_HASHES,
    group_select: int = 0,
    fallback: str = _INVALID,
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    regexes_to_ignore: Sequence[str] | None = None,
) -> Step:
    """A letter such as "(B)": by the pattern, else by a choice's text, else by a letter after a colon.

    The document's field `choices` has the texts.
    """
    pattern = _compiled(regex_pattern)
    ignored = [_compiled(each) for each in regexes_to_ignore or ()]

    def plain(text: str) -> str:
        for each in ignored:
            text = each.sub("", text)
        text = text.lower() if ignore_case else text
        return text.translate(_punctuation()) if ignore_punctuation else text

    def letter(answer: str, choices: Sequence[str]) -> str:
        if found := _match(pattern, answer, group_select):
            return found
        letters = {plain(text.strip()): f"({chr(ord('A') + at)})" for at, text in enumerate(choices)}
        texts = re.compile("|".join(map(re.escape, letters)))
        if found := _match(texts, plain(answer), group_select):
            return letters.get(found, found)
        last = chr(ord("A") + len(choices) - 1)
        found = _match(re.compile(rf":[\s]*([A-{last}])"), answer, group_select)
        return f"({found})" if found else str(fallback)

    def step(answers: Sequence[str], document: Mapping[str, Any]) -> list[str]:
        choices = document.get("choices")
        if not isinstance(choices, list) or not choices:
            raise InputError(
                "The filter multi_choice_regex wants documents with a list in the field choices."
            )
        return [letter(each, [str(choice) for choice in choices]) for each in answers]

    return step


@cache
def _punctuation() -> Mapping[int, None]:
    """Every character that Unicode calls punctuation."""
    marks = (at for at in range(sys.maxunicode) if unicodedata.category(chr(at)).startswith("P"))
    return dict.fromkeys(marks)


def take_first() -> Step:
    """Only the first answer."""
    return lambda answers, _: list(answers[:1])


def take_first_k(k: int) -> Step:
    """The first `k` answers."""
    return lambda answers, _: list(answers[:k])


def majority_vote() -> Step:
    """The most frequent answer, of equally frequent ones the first."""
    return lambda answers, _: [Counter(answers).most_common(1)[0][0]]


def remove_whitespace() -> Step:
    """Without one space at the beginning."""
    return lambda answers, _: [each.removeprefix(" ") for each in answers]


def lowercase() -> Step:
    """In lower case."""
    return lambda answers, _: [each.lower() for each in answers]


def uppercase() -> Step:
    """In upper case."""
    return lambda answers, _: [each.upper() for each in answers]


def mapped(mapping_dict: Mapping[str, Any] | None = None, default_value: Any = None) -> Step:
    """What a table says of an answer."""
    table = dict(mapping_dict or {})
    return lambda answers, _: [str(table.get(each, default_value)) for each in answers]


FILTERS: dict[str, Callable[..., Step]] = {
    "regex": regex,
    "multi_choice_regex": multi_choice_regex,
    "take_first": take_first,
    "take_first_k": take_first_k,
    "majority_vote": majority_vote,
    "remove_whitespace": remove_whitespace,
    "lowercase": lowercase,
    "uppercase": uppercase,
    "map": mapped,
}


def pipeline(steps: Sequence[Mapping[str, Any]]) -> Step:
    """Steps one after another; each a mapping with `function` and that function's arguments.

    Raises:
        UsageError: a step that there is not; names the nearest.
        InputError: arguments that a step does not take.
    """
    made = [_step(dict(each)) for each in steps]

    def run(answers: Sequence[str], document: Mapping[str, Any]) -> list[str]:
        found = list(answers)
        for each in made:
            found = each(found, document)
        return found

    return run


def _step(told: dict[str, Any]) -> Step:
    name = str(told.pop("function", None))
    if name not in FILTERS:
        raise unknown_name("filter", name, FILTERS)
    settings = dict(told.pop("kwargs", None) or {}) | told
    make = FILTERS[name]
    try:
        signature(make).bind(**settings)
    except TypeError as error:
        known = ", ".join(signature(make).parameters) or "nothing"
        raise InputError(f"The filter {name} takes {known}: {error}.") from error
    _require_kinds(name, make, settings)
    return make(**settings)


def _require_kinds(name: str, make: Callable[..., Step], settings: Mapping[str, Any]) -> None:
    kinds: Mapping[Any, tuple[type, ...]] = {
        int: (int,),
        bool: (bool,),
        Sequence[str] | None: (list, type(None)),
        Mapping[str, Any] | None: (dict, type(None)),
    }
    for key, value in settings.items():
        wanted = kinds.get(signature(make).parameters[key].annotation, (object,))
        if not isinstance(value, wanted) or (
            isinstance(value, bool) and bool not in wanted and int in wanted
        ):
            raise InputError(f"The filter {name} does not take {key}: {value!r}.")
