"""scenarios: where questions come from, and the runs that run entries name.

A run entry is written as in HELM: `mmlu:subject=anatomy,data_augmentation=canonical,max_eval_instances=100`.
`run_spec_of(entry)` makes it a run, `load_instances(spec, root)` reads what it asks.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from capstan.errors import InputError, UsageError, unknown_name
from capstan.evaluation.instances import Instance
from capstan.evaluation.perturbations import perturbation_sets
from capstan.evaluation.scenarios import (
    brackets,
    choices,
    code,
    entities,
    generators,
    grammar,
    harms,
    labels,
    question_answering,
    reasoning,
    retrieval,
    stereotypes,
    summaries,
    texts,
)
from capstan.evaluation.scenarios.lm_eval_groups import TaskGroup, read_group
from capstan.evaluation.scenarios.lm_eval_tasks import TASK_CLASS, is_task, lm_eval_scenario, load_task
from capstan.evaluation.scenarios.scenario import DataFolder, Scenario
from capstan.evaluation.scenarios.tables import (
    TABLE_CLASS,
    load_table,
    python_scenario,
    read_yaml,
    table_scenario,
)
from capstan.evaluation.specs import RunSpec, ScenarioSpec

__all__ = [
    "SCENARIOS",
    "DataFolder",
    "Scenario",
    "TaskGroup",
    "group_of",
    "load_instances",
    "parse_entry",
    "run_spec_of",
    "scenario_of",
]

SCENARIOS: tuple[Scenario, ...] = (
    *question_answering.SCENARIOS,
    *choices.SCENARIOS,
    *grammar.SCENARIOS,
    *stereotypes.SCENARIOS,
    *labels.SCENARIOS,
    *retrieval.SCENARIOS,
    *summaries.SCENARIOS,
    *texts.SCENARIOS,
    *generators.SCENARIOS,
    *brackets.SCENARIOS,
    *reasoning.SCENARIOS,
    *entities.SCENARIOS,
    *harms.SCENARIOS,
    *code.SCENARIOS,
)
_ADAPTER_SETTINGS: Mapping[str, Callable[[str], Any]] = {
    "max_train_instances": int,
    "max_eval_instances": int,
    "num_train_trials": int,
    "num_trials": int,
    "num_outputs": int,
    "max_tokens": int,
    "temperature": float,
    "instructions": lambda text: f"{text}\n" if text else "",
    "stop": lambda text: (text.replace("\\n", "\n"),),
}
_SETTING_NAMES = {"stop": "stop_sequences"}


def parse_entry(entry: str) -> tuple[str, dict[str, str]]:
    """A run entry's scenario and arguments; a comma in a value is kept where no name follows it."""
    name, _, told = entry.partition(":")
    args: dict[str, str] = {}
    last = ""
    for part in told.split(",") if told else []:
        key, equals, value = part.partition("=")
        if equals:
            args[key.strip()], last = value, key.strip()
        elif last:
            args[last] += f",{part}"
        else:
            raise UsageError(f"The run entry {entry!r} wants name=value after the colon, not {part!r}.")
    return name.strip(), args


def scenario_of(name: str, args: Mapping[str, str] | None = None) -> Scenario:
    """The scenario that a run entry begins with; a path to a YAML or Python file is one's own.

    Raises:
        UsageError: there is none of that name; names the nearest.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return lm_eval_scenario(path) if is_task(read_yaml(path)) else table_scenario(path)
    if path.suffix == ".py":
        return python_scenario(path)
    found = [each for each in SCENARIOS if each.name == name]
    if not found:
        raise unknown_name("scenario", name, sorted({each.name for each in SCENARIOS}))
    wanted = (args or {}).get("dataset")
    return next((each for each in found if each.folder == wanted), found[0])


def group_of(entry: str) -> TaskGroup | None:
    """The group of lm-evaluation-harness's tasks that a run entry names, if it names one."""
    path = Path(parse_entry(entry)[0])
    return read_group(path) if path.suffix in (".yaml", ".yml") else None


def run_spec_of(entry: str, *, root: Path | None = None, scenario: Scenario | None = None) -> RunSpec:
    """The run that an entry names, HELM's general settings applied; of `scenario`, where a group has it.

    Raises:
        UsageError: an unknown scenario, or arguments that it does not take.
    """
    name, args = parse_entry(entry)
    scenario = scenario or scenario_of(name, args)
    general = _general(scenario)
    own = {key: value for key, value in args.items() if key not in general}
    if name == "raft" and scenario.data(root).exists("prompt_construction_settings.json"):
        own.setdefault("instructions", labels.raft_settings(scenario.data(root), own.get("subset", ""))[1])
    _require_arguments(entry, scenario, own)
    try:
        spec = scenario.run_spec(**own)
    except ValueError as error:
        raise UsageError(f"The run entry {entry!r} has a value that is none: {error}.") from error
    return _adjusted(spec, {key: value for key, value in args.items() if key in general})


def _require_arguments(entry: str, scenario: Scenario, own: Mapping[str, str]) -> None:
    parameters = signature(scenario.run_spec).parameters.values()
    known = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]
    if len(known) < len(parameters):  # it hands on what it is given
        loading = signature(scenario.load).parameters.values()
        known += [each.name for each in loading if each.kind is each.KEYWORD_ONLY]
    missing = [
        each.name
        for each in parameters
        if each.name in known and each.default is each.empty and each.name not in own
    ]
    for name in own:
        if name not in known:
            raise unknown_name(f"argument of {entry.partition(':')[0]}", name, known)
    if missing:
        raise UsageError(f"The run entry {entry!r} lacks {', '.join(missing)}.")


def _general(scenario: Scenario) -> set[str]:
    """The settings that every run entry takes, less those that the scenario itself gives a meaning."""
    known = {"data_augmentation", "model", "model_deployment", *_ADAPTER_SETTINGS}
    return known - set(signature(scenario.run_spec).parameters)


def _adjusted(spec: RunSpec, settings: Mapping[str, str]) -> RunSpec:
    changes: dict[str, Any] = {}
    for key, value in settings.items():
        if key in _ADAPTER_SETTINGS:
            changes[_SETTING_NAMES.get(key, key)] = _setting(key, value)
        elif key == "data_augmentation":
            spec = replace(spec, data_augmenter_spec=perturbation_sets(value))
        elif key == "model":
            changes["model"] = value
        else:
            changes["model_deployment"] = value
    shown = [f"{key}={value}" for key, value in settings.items() if key != "stop"]
    if not shown:
        return spec
    separator = "," if ":" in spec.name else ":"
    return replace(spec, name=spec.name + separator + ",".join(shown)).with_adapter(**changes)


def _setting(key: str, value: str) -> Any:
    try:
        return _ADAPTER_SETTINGS[key](value)
    except ValueError as error:
        kind = "whole number" if _ADAPTER_SETTINGS[key] is int else "number"
        raise UsageError(f"{key} wants a {kind}, not {value!r}.") from error


def load_instances(
    spec: ScenarioSpec, root: Path | None, *, uses_hub: bool = False, scenario: Scenario | None = None
) -> list[Instance]:
    """All instances of a scenario, with ids in loading order.

    Raises:
        InputError: files are missing or not what they should be.
    """
    data = DataFolder(folder=root or Path("data"))
    if scenario is not None and scenario.class_name not in (TABLE_CLASS, TASK_CLASS):
        found = scenario.load(scenario.data(root, uses_hub=uses_hub), **spec.args)
    elif spec.class_name == TABLE_CLASS:
        found = load_table(data, **spec.args)
    elif spec.class_name == TASK_CLASS:
        found = load_task(data, **spec.args)
    else:
        known = next((each for each in SCENARIOS if each.class_name == spec.class_name), None)
        if known is None:
            raise unknown_name("scenario class", spec.class_name, [each.class_name for each in SCENARIOS])
        found = known.load(known.data(root, uses_hub=uses_hub), **spec.args)
    if not found:
        raise InputError(f"The scenario {spec.short_name} has no instances: its files are empty.")
    return [replace(instance, id=f"id{index}") for index, instance in enumerate(found)]
