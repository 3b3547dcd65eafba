"""A row of a task's data as an instance: its templates filled as lm-evaluation-harness fills them.

A template that names a field is that field's value; anything else is Jinja, rendered in a sandbox. A rendered
target of digits is an index into the choices, a text otherwise.

Source: lm-evaluation-harness 0.4, `api/task.py`, `utils.py` (regex_replace, strict, trailing newlines).
"""

import ast
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from capstan.errors import InputError, require_extra
from capstan.evaluation.instances import Instance, choices, correct

Row = Mapping[str, Any]


@cache
def _environment() -> Any:
    require_extra("evaluation", "jinja2")
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    made = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    made.filters["regex_replace"] = lambda text, pattern, by, count=0: re.sub(pattern, by, text, count=count)
    return made


def filled(template: str, row: Row) -> str:
    """A Jinja template filled with a row.

    Raises:
        InputError: it is no template, or wants what the row lacks.
    """
    environment = _environment()
    from jinja2 import TemplateError

    try:
        return str(environment.from_string(template).render(**{str(key): row[key] for key in row}))
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, re.error) as error:
        known = ", ".join(map(str, row))
        raise InputError(
            f"The template {template!r} cannot be filled: {error}. The fields are {known}."
        ) from error


def _value(template: Any, row: Row) -> Any:
    """A field, a filled template, or what is no text as it stands."""
    if not isinstance(template, str):
        return template
    return row[template] if template in row else filled(template, row)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def text_of(told: Row, row: Row, where: str) -> str:
    """`doc_to_text` of a row."""
    found = _value(told["doc_to_text"], row)
    is_index = isinstance(found, int) or (isinstance(found, str) and "{" in str(told["doc_to_text"]) and (
        found.isdigit() and "doc_to_choice" in told))  # fmt: skip
    if is_index and "doc_to_choice" in told:
        raise InputError(
            f"{where}: doc_to_text gives the index {found}: choices as contexts are not taken over. "
            "It must give a text."
        )
    if found is None or isinstance(found, (list, dict)):
        raise InputError(f"{where}: doc_to_text must give a text, not {found!r}.")
    return str(found)


def choices_of(told: Row, row: Row, where: str) -> list[str] | None:
    """`doc_to_choice` of a row: a list, or a mapping's values; None where the task has none."""
    template = told.get("doc_to_choice")
    if template is None:
        return None
    if isinstance(template, list):
        found: Any = [filled(each, row) if isinstance(each, str) else each for each in template]
    else:
        found = _value(template, row)
        found = _literal(found) if isinstance(found, str) else found
    found = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(found, (list, tuple)) or not found or any(each is None for each in found):
        raise InputError(f"{where}: doc_to_choice must give a list of texts, not {found!r}.")
    return [str(each) for each in found]


def target_of(told: Row, row: Row, where: str) -> Any:
    """`doc_to_target` of a row: a text, an index, or a list of either."""
    template = told["doc_to_target"]
    found = _value(template, row)
    if isinstance(template, str) and template not in row:
        is_index = found.isdigit() and told.get("doc_to_choice") is not None
        if is_index or (len(found) >= 2 and found[0] == "[" and found[-1] == "]"):
            found = _literal(found)
    if found is None or found == [] or isinstance(found, dict):
        raise InputError(f"{where}: doc_to_target must give an answer, not {found!r}.")
    return found


def right_choices(target: Any, options: list[str], where: str) -> set[int]:
    """Which choices a target means: by index, or by text.

    Raises:
        InputError: one means none of them.
    """
    found = set()
    for each in target if isinstance(target, (list, tuple)) else [target]:
        if isinstance(each, int) or (isinstance(each, float) and each.is_integer()):
            index = int(each)
        else:
            index = options.index(str(each)) if str(each) in options else -1
        if not 0 <= index < len(options):
            raise InputError(
                f"{where}: the target {each!r} is none of the {len(options)} choices (index or text)."
            )
        found.add(index)
    return found


def instance_of(told: Row, row: Row, split: str, where: str, place: Mapping[str, Any]) -> Instance:
    """A row as a question; `extra` has its place and what a prompt or a filter needs of the row."""
    extra = dict(place)
    for key in ("description", "gen_prefix"):
        if told.get(key):
            extra[key] = filled(str(told[key]), row)
    if isinstance(row.get("choices"), list):
        extra["choices"] = [str(each) for each in row["choices"]]
    options, target = choices_of(told, row, where), target_of(told, row, where)
    text = text_of(told, row, where)
    if options is not None:
        right = right_choices(target, options, where)
        if told.get("output_type") == "multiple_choice":
            return Instance(input=text, references=choices(options, right), split=split, extra=extra)
        target = [options[index] for index in sorted(right)]
    texts = target if isinstance(target, (list, tuple)) else [target]
    references = tuple(correct(str(each)) for each in texts)
    return Instance(input=text, references=references, split=split, extra=extra)
