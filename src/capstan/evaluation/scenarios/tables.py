"""Scenarios of one's own: a YAML file over a JSONL, CSV or Parquet file, or a Python file.

name: capitals
data: capitals.jsonl            # beside the YAML; {"question": ..., "options": [...], "answer": 1}
train: capitals-train.jsonl     # examples for prompts, if any
input: "{question}"             # fields in braces; {question.text} is a field of a field
choices: options                # a field with a list, or a list of fields; none: a free answer
choices_separator: ","          # where a cell of a CSV holds choices that are no JSON list
answer: answer                  # index, letter or text; several texts in a list are all right
adapter: {method: multiple_choice_joint, instructions: Answer., max_tokens: 1}
metrics: [exact_match, quasi_exact_match]
main_metric: exact_match
"""

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import yaml

from capstan.errors import CapstanError, InputError, UsageError, unknown_name
from capstan.evaluation.instances import TEST, TRAIN, Instance, choices, correct
from capstan.evaluation.metrics.text_match import MEASURES
from capstan.evaluation.scenarios import asking
from capstan.evaluation.scenarios.scenario import DataFolder, Scenario
from capstan.evaluation.specs import METHODS, SCORED, AdapterSpec, RunSpec, ScenarioSpec

TABLE_CLASS = "capstan.evaluation.scenarios.tables.TableScenario"
_KNOWN: Mapping[str, tuple[type, ...]] = {
    "name": (str, int),
    "description": (str,),
    "data": (str,),
    "train": (str,),
    "input": (str,),
    "choices": (str, list),
    "choices_separator": (str,),
    "answer": (str,),
    "adapter": (dict,),
    "metrics": (list,),
    "main_metric": (str,),
}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TEXT_METHOD = "language_modeling"


class _OnceLoader(yaml.SafeLoader):
    """Plain YAML in which a mapping names a key once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name!r} stands twice in one mapping")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping; tags that would run code are refused, and a key that stands twice.

    Raises:
        InputError: it is not there, no YAML, or no mapping.
    """
    try:
        found = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_OnceLoader)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error}).") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is no plain YAML (tags such as !function are refused): {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} wants a mapping of names to values, not {type(found).__name__}.")
    return found


def table_scenario(path: Path) -> Scenario:
    """The scenario that a YAML file describes.

    Raises:
        InputError: fields are missing, unknown, or not of their kind.
    """
    told = _checked(read_yaml(path), path)
    method, is_text = _method(told), _method(told) == _TEXT_METHOD
    usual = _measures(method)[:1] if method in SCORED else ["exact_match", "quasi_exact_match", "f1_score"]
    metrics = list(told.get("metrics", usual))
    main = str(told.get("main_metric", metrics[0]))
    if main not in metrics:
        raise InputError(f"{path}: the main_metric {main!r} is none of the metrics {', '.join(metrics)}.")
    name = str(told["name"])
    spec = RunSpec(
        name=name,
        scenario_spec=ScenarioSpec(class_name=TABLE_CLASS, args={"path": str(path.resolve())}),
        adapter_spec=_adapter(told, path),
        metric_specs=asking.texts() if is_text else asking.basic(*metrics),
        groups=(name,),
    )
    return Scenario(
        name=name,
        folder="",
        class_name=TABLE_CLASS,
        description=str(told.get("description", "")),
        load=load_table,
        run_spec=lambda: spec,
        main_metric=main,
    )


def _checked(told: dict[str, Any], path: Path) -> dict[str, Any]:
    """A table's mapping of which every key is known and of its kind; what is empty is as left out."""
    found = {key: value for key, value in told.items() if value is not None}
    if "adapter" in found and not isinstance(found["adapter"], dict):
        raise InputError(f"{path}: adapter must be a mapping of settings, not {found['adapter']!r}.")
    needed = {"name", "data", "input"} | (set() if _method(found) == _TEXT_METHOD else {"answer"})
    unknown, missing = set(told) - set(_KNOWN), needed - set(found)
    if unknown or missing:
        words = [f"lacks {', '.join(sorted(missing))}"] if missing else []
        words += [f"has the unknown {', '.join(sorted(map(str, unknown)))}"] if unknown else []
        raise InputError(f"{path} {' and '.join(words)}. Known: {', '.join(sorted(_KNOWN))}.")
    if isinstance(found.get("metrics"), str):
        found["metrics"] = [found["metrics"]]
    for key, value in found.items():
        is_kind = isinstance(value, _KNOWN[key]) and not isinstance(value, bool)
        if not is_kind or (key != "description" and value in ("", [])):
            kinds = " or a ".join(kind.__name__ for kind in _KNOWN[key])
            raise InputError(f"{path}: {key} must be a {kinds}, not {value!r}.")
    if "choices_separator" in found and not isinstance(found.get("choices"), str):
        raise InputError(f"{path}: choices_separator goes with choices that name one field.")
    method = _method(found)
    for name in found.get("metrics", ()):
        if name not in _measures(method):
            raise InputError(f"{path}: {unknown_name(f'measure for {method}', str(name), _measures(method))}")
    return found


def _measures(method: str) -> list[str]:
    if method == _TEXT_METHOD:
        return ["bits_per_byte"]
    return ["exact_match"] if method in SCORED else list(MEASURES)


def _method(told: Mapping[str, Any]) -> str:
    usual = "multiple_choice_joint" if "choices" in told else "generation"
    return str((told.get("adapter") or {}).get("method", usual))


def _adapter(told: Mapping[str, Any], path: Path) -> AdapterSpec:
    settings = dict(told.get("adapter", {}))
    settings.pop("method", None)
    method = _method(told)
    try:
        if method not in METHODS or method == "ranking_binary":
            raise unknown_name(
                "adapter method", method, [each for each in METHODS if each != "ranking_binary"]
            )
        if method.startswith("multiple_choice") and "choices" not in told:
            raise UsageError(f"the method {method} wants choices")
        return _asked_by(method, _settings(settings))
    except CapstanError as error:
        raise InputError(f"{path}: the adapter {method} cannot be made: {error}") from error


def _asked_by(method: str, settings: dict[str, Any]) -> AdapterSpec:
    """An adapter with HELM's defaults for a method, and over them the settings told."""
    if method == _TEXT_METHOD:
        if settings:
            raise UsageError(f"a text is scored as it is: {', '.join(settings)} means nothing")
        return asking.language_modeling()
    nouns = ("input_noun", "output_noun", "newline_after_input_noun")
    named = {key: settings.pop(key) for key in nouns if key in settings}
    if "instructions" in settings:
        settings["instructions"] += "\n" * bool(settings["instructions"])
    if "stop" in settings:
        settings["stop_sequences"] = settings.pop("stop")
    if method in SCORED:
        if wrong := [
            *named,
            *(set(settings) & {"max_tokens", "temperature", "stop_sequences", "num_outputs"}),
        ]:
            raise UsageError(f"choices are scored one by one: {', '.join(wrong)} means nothing")
        made = asking.multiple_choice(method)
    elif method.startswith("multiple_choice"):
        if "newline_after_input_noun" in named:
            raise UsageError("newline_after_input_noun is for generation")
        made = asking.multiple_choice(method, **{"input_noun": "Question", **named})
    else:
        made = asking.generation(**{"input_noun": "Question", "output_noun": "Answer", **named})
    return replace(made, **settings)


# What an adapter's setting must be, by the type that its field is written with.
_KINDS: Mapping[Any, tuple[type, ...]] = {
    str: (str,), bool: (bool,), int: (int,), float: (int, float),
    str | None: (str, type(None)), int | None: (int, type(None)), tuple[str, ...]: (list,),
}  # fmt: skip


def _settings(told: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an adapter, each of its kind; `stop` may be one text."""
    annotations = {
        "stop": tuple[str, ...], "input_noun": str | None, "output_noun": str | None,
        "newline_after_input_noun": bool,
        **{each.name: each.annotation for each in signature(AdapterSpec).parameters.values()
           if each.name not in ("method", "model", "model_deployment")},
    }  # fmt: skip
    found = dict(told)
    for key, value in told.items():
        if isinstance(value, str) and annotations.get(key) == tuple[str, ...]:
            found[key] = value = [value]
        wanted = _KINDS.get(annotations.get(key))
        if wanted is None:
            raise unknown_name(
                "adapter setting", str(key), [n for n, a in annotations.items() if a in _KINDS]
            )
        is_kind = isinstance(value, wanted) and (bool in wanted or not isinstance(value, bool))
        if not is_kind or (isinstance(value, list) and not all(isinstance(each, str) for each in value)):
            raise UsageError(f"{key}: {value!r} is not of its kind")
        found[key] = tuple(value) if isinstance(value, list) else value
    return found


# --- rows -------------------------------------------------------------------------------------------------


def load_table(_: DataFolder, *, path: str) -> list[Instance]:
    """The instances of a YAML file's tables."""
    where = Path(path)
    told = _checked(read_yaml(where), where)
    instances = []
    for key, split in (("train", TRAIN), ("data", TEST)):
        if key in told:
            rows = rows_of(where.parent / told[key])
            instances += [
                _instance(told, row, split, f"{told[key]}, row {number}")
                for number, row in enumerate(rows, 1)
            ]
    return instances


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON (a list, or an object a line), JSONL, CSV, TSV or Parquet file.

    Raises:
        InputError: it cannot be read, or holds no rows.
    """
    data, name = DataFolder(folder=path.parent), path.name
    kind = path.name.removesuffix(".gz").removesuffix(".zst").rsplit(".", 1)[-1].lower()
    if kind in ("csv", "tsv"):
        found: list[dict[str, Any]] = list(data.records(name, delimiter="," if kind == "csv" else "\t"))
        for number, row in enumerate(found, 1):
            if None in row:
                raise InputError(f"{name}, row {number} has more cells than the header; quote its commas.")
        return found
    if kind == "parquet":
        return data.parquet(name)
    if kind == "json" and data.text(name).lstrip().startswith("["):
        listed = data.json(name)
        for number, row in enumerate(listed, 1):
            if not isinstance(row, dict):
                raise InputError(f"{name}, row {number}: wants an object, not {str(row)[:40]!r}.")
        return list(listed)
    return list(data.jsonl(name))


def _instance(told: Mapping[str, Any], row: Mapping[str, Any], split: str, where: str) -> Instance:
    text = filled(told["input"], row, where)
    if "answer" not in told:
        return Instance(input=text, split=split)
    answer = _field(row, told["answer"], where)
    if "choices" not in told:
        texts = answer if isinstance(answer, list) else [answer]
        if not texts or any(each is None or each == "" or isinstance(each, (dict, list)) for each in texts):
            raise InputError(f"{where}: the field {told['answer']!r} has no answer: {answer!r}.")
        return Instance(input=text, references=tuple(correct(str(each)) for each in texts), split=split)
    options = _options(told, row, where)
    return Instance(input=text, references=choices(options, _right(options, answer, where)), split=split)


def _options(told: Mapping[str, Any], row: Mapping[str, Any], where: str) -> list[str]:
    """A row's choices: a list, its JSON, or a text that `choices_separator` cuts."""
    named, separator = told["choices"], told.get("choices_separator")
    if isinstance(named, list):
        found: Any = [_field(row, each, where) for each in named]
    else:
        found = _field(row, named, where)
        if isinstance(found, str):
            found = _listed(found, separator, f"{where}: the field {named!r}")
    if not isinstance(found, list) or not 2 <= len(found) <= len(_LETTERS):
        raise InputError(f"{where}: choices must be a list of 2 to {len(_LETTERS)}, not {found!r}.")
    if any(each is None or each == "" or isinstance(each, (dict, list)) for each in found):
        raise InputError(f"{where}: a choice is empty or no text: {found!r}.")
    return [str(each) for each in found]


def _listed(text: str, separator: str | None, where: str) -> Any:
    if separator is not None:
        return [each.strip() for each in text.split(separator)]
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(
            f"{where} is a text, {text[:60]!r}, not a list of choices. Write it as JSON (["
            '"apple", "stone"]), or say what stands between choices: choices_separator: ","'
        ) from error


def _right(options: Sequence[str], answer: Any, where: str) -> int:
    """Which option an index, a letter or a text means."""
    if isinstance(answer, float) and answer.is_integer():  # as tables store whole numbers beside gaps
        answer = int(answer)
    if isinstance(answer, bool):
        answer = int(answer)
    if str(answer) in options and not isinstance(answer, int):
        return options.index(str(answer))
    if isinstance(answer, int) or (isinstance(answer, str) and answer.isdecimal()):
        index = int(answer)
    elif isinstance(answer, str) and len(answer) == 1 and answer.upper() in _LETTERS:
        index = _LETTERS.index(answer.upper())
    else:
        index = -1
    if not 0 <= index < len(options):
        raise InputError(
            f"{where}: the answer {answer!r} is none of {len(options)} choices (index, letter or text)."
        )
    return index


def _field(row: Mapping[str, Any], name: Any, where: str) -> Any:
    """A row's field, or with points between names a field of a field."""
    if name in row:
        found: Any = row[name]
    else:
        found = row
        for part in str(name).split("."):
            if not isinstance(found, Mapping) or part not in found:
                raise InputError(f"{where} has no field {name!r}; it has {', '.join(map(str, row))}.")
            found = found[part]
    if found is None or (isinstance(found, float) and found != found):
        raise InputError(f"{where}: the field {name!r} is null.")
    return found


def filled(template: str, row: Mapping[str, Any], where: str) -> str:
    """A template whose `{field}`s are replaced; braces around what is no name mean nothing.

    Raises:
        InputError: a field that the row lacks, or that is no text or number.
    """

    def value(found: re.Match[str]) -> str:
        told = _field(row, found[1], where)
        if isinstance(told, (dict, list)):
            raise InputError(f"{where}: the field {found[1]!r} is no text but {str(told)[:60]}.")
        return str(told)

    return re.sub(r"\{(\w[\w .\-]*)\}", value, template)


def python_scenario(path: Path) -> Scenario:
    """The `SCENARIO` that a Python file defines. The file runs: name only files that you trust.

    Raises:
        InputError: it cannot be read, does not run, or defines none.
        UsageError: what it defines is no Scenario.
    """
    spec = importlib.util.spec_from_file_location(f"capstan_user_{path.stem}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise InputError(f"{path} is no Python file that can be read.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises
        raise InputError(f"{path} does not run: {type(error).__name__}: {error}") from error
    found = getattr(module, "SCENARIO", None)
    if not isinstance(found, Scenario):
        raise UsageError(f"{path} must define SCENARIO, a capstan.evaluation.Scenario; it has {found!r}.")
    return found
