"""Scenarios of one's own: a YAML file over a JSONL, CSV or Parquet file, or a Python file.

name: capitals
data: capitals.jsonl            # beside the YAML; {"question": ..., "options": [...], "answer": 1}
train: capitals-train.jsonl     # examples for prompts, if any
input: "{question}"
choices: options                # a field with a list, or a list of fields; none: a free answer
answer: answer                  # index, letter or text; several texts in a list are all right
adapter: {method: multiple_choice_joint, instructions: Answer., max_tokens: 1}
metrics: [exact_match, quasi_exact_match]
main_metric: exact_match
"""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from capstan.errors import InputError, UsageError
from capstan.evaluation.instances import TEST, TRAIN, Instance, choices, correct
from capstan.evaluation.scenarios import asking
from capstan.evaluation.scenarios.scenario import DataFolder, Scenario
from capstan.evaluation.specs import RunSpec, ScenarioSpec

TABLE_CLASS = "capstan.evaluation.scenarios.tables.TableScenario"
_KNOWN = {
    "name",
    "description",
    "data",
    "train",
    "input",
    "choices",
    "answer",
    "adapter",
    "metrics",
    "main_metric",
}
_LETTERS = "ABCDEFGHIJ"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping; tags that would run code are refused.

    Raises:
        InputError: it is not there, no YAML, or no mapping.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no plain YAML (tags such as !function are refused): {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} wants a mapping of names to values, not {type(found).__name__}.")
    return found


def table_scenario(path: Path) -> Scenario:
    """The scenario that a YAML file describes.

    Raises:
        InputError: fields are missing or unknown.
    """
    told = read_yaml(path)
    is_text = told.get("adapter", {}).get("method") == "language_modeling"
    needed = {"name", "data", "input"} | (set() if is_text else {"answer"})
    unknown, missing = set(told) - _KNOWN, needed - set(told)
    if unknown or missing:
        words = [f"lacks {', '.join(sorted(missing))}"] if missing else []
        words += [f"has the unknown {', '.join(sorted(unknown))}"] if unknown else []
        raise InputError(f"{path} {' and '.join(words)}. Known: {', '.join(sorted(_KNOWN))}.")
    usual = ["bits_per_byte"] if is_text else ["exact_match", "quasi_exact_match", "f1_score"]
    metrics = told.get("metrics", usual)
    name = str(told["name"])
    spec = RunSpec(
        name=name,
        scenario_spec=ScenarioSpec(class_name=TABLE_CLASS, args={"path": str(path)}),
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
        main_metric=str(told.get("main_metric", metrics[0] if metrics else "exact_match")),
    )


def _adapter(told: Mapping[str, Any], path: Path) -> Any:
    settings = dict(told.get("adapter", {}))
    method = settings.pop("method", "multiple_choice_joint" if "choices" in told else "generation")
    try:
        if method.startswith("multiple_choice"):
            return asking.multiple_choice(method, **{"input_noun": "Question", **settings})
        if method == "language_modeling":
            return asking.language_modeling()
        return asking.generation(**{"input_noun": "Question", "output_noun": "Answer", **settings})
    except TypeError as error:
        raise InputError(f"{path}: the adapter {method} does not take {settings}: {error}") from error


def load_table(_: DataFolder, *, path: str) -> list[Instance]:
    """The instances of a YAML file's tables."""
    where = Path(path)
    told = read_yaml(where)
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
    """The rows of a JSONL, CSV, TSV or Parquet file."""
    data, name = DataFolder(folder=path.parent), path.name
    kind = path.name.removesuffix(".gz").removesuffix(".zst").rsplit(".", 1)[-1]
    if kind == "csv":
        return list(data.records(name))
    if kind == "tsv":
        return list(data.records(name, delimiter="\t"))
    if kind == "parquet":
        return data.parquet(name)
    if kind == "json":
        return list(data.json(name))
    return list(data.jsonl(name))


def _instance(told: Mapping[str, Any], row: Mapping[str, Any], split: str, where: str) -> Instance:
    text = filled(told["input"], row, where)
    if "answer" not in told:
        return Instance(input=text, split=split)
    answer = _field(row, told["answer"], where)
    if "choices" not in told:
        texts = answer if isinstance(answer, list) else [answer]
        return Instance(input=text, references=tuple(correct(str(each)) for each in texts), split=split)
    named = told["choices"]
    options = (
        [_field(row, each, where) for each in named] if isinstance(named, list) else _field(row, named, where)
    )
    options = [str(option) for option in options]
    return Instance(input=text, references=choices(options, _right(options, answer, where)), split=split)


def _right(options: Sequence[str], answer: Any, where: str) -> int:
    """Which option an index, a letter or a text means."""
    if isinstance(answer, bool):
        answer = int(answer)
    if str(answer) in options and not isinstance(answer, int):
        return options.index(str(answer))
    if isinstance(answer, int) or str(answer).isdigit():
        index = int(answer)
    elif len(str(answer)) == 1 and str(answer).upper() in _LETTERS:
        index = _LETTERS.index(str(answer).upper())
    else:
        index = -1
    if not 0 <= index < len(options):
        raise InputError(
            f"{where}: the answer {answer!r} is none of {len(options)} choices (index, letter or text)."
        )
    return index


def _field(row: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise InputError(f"{where} has no field {name!r}; it has {', '.join(map(str, row))}.")
    return row[name]


def filled(template: str, row: Mapping[str, Any], where: str) -> str:
    """A template whose `{field}`s are replaced; nothing else in it means anything."""
    return re.sub(r"\{(\w+)\}", lambda found: str(_field(row, found[1], where)), template)


def python_scenario(path: Path) -> Scenario:
    """The `SCENARIO` that a Python file defines. The file runs: name only files that you trust.

    Raises:
        InputError: it cannot be read, or defines none.
        UsageError: what it defines is no Scenario.
    """
    spec = importlib.util.spec_from_file_location(f"capstan_user_{path.stem}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise InputError(f"{path} is no Python file that can be read.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, "SCENARIO", None)
    if not isinstance(found, Scenario):
        raise UsageError(f"{path} must define SCENARIO, a capstan.evaluation.Scenario; it has {found!r}.")
    return found
