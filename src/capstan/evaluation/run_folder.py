"""A run's folder, as crfm-helm writes and reads it, with a report of ours beside.

`runs/<suite>/<run>/` holds run_spec.json, scenario.json, scenario_state.json, stats.json and
per_instance_stats.json; helm-summarize and helm-server take it. What is None or NaN is left out.
`capstan.json` has the intervals, the time and notes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capstan.errors import InputError
from capstan.evaluation.adapters import RequestState
from capstan.evaluation.instances import Instance, PerturbationDescription, Reference
from capstan.evaluation.intervals import Interval, interval_of
from capstan.evaluation.models import Completion, Request, Result, Token
from capstan.evaluation.running import Evaluated
from capstan.evaluation.scenarios import SCENARIOS, TaskGroup
from capstan.evaluation.specs import (
    AdapterSpec,
    AugmenterSpec,
    Chat,
    MetricSpec,
    PerturbationSpec,
    RunSpec,
    ScenarioSpec,
)
from capstan.storage import write_atomically

REPORT = "capstan.json"
_LONGEST_NAME = 255  # bytes, on the file systems in use


def folder_name(run: str) -> str:
    """A run's name as a folder's."""
    return run.replace("/", "_").replace("\0", "_") or "_"


def write_run(evaluated: Evaluated, suite_folder: Path) -> Path:
    """Write a run's folder; each file under another name first, so that none is half."""
    folder = suite_folder / folder_name(evaluated.spec.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}. Name another --output.") from error
    spec, found = evaluated.spec, evaluated.measurement
    _write(folder / "run_spec.json", spec.to_dict())
    _write(folder / "scenario.json", _scenario(spec))
    states = [state.to_dict(spec.adapter_spec) for state in evaluated.states]
    _write(
        folder / "scenario_state.json",
        {"adapter_spec": spec.adapter_spec.to_dict(), "request_states": states, "annotator_specs": []},
    )
    _write(folder / "stats.json", [each.to_dict() for each in found.stats])
    _write(folder / "per_instance_stats.json", [each.to_dict() for each in found.per_instance])
    _write(folder / REPORT, report_of(evaluated))
    return folder


def read_report(folder: Path) -> dict[str, Any]:
    """The report in a run's folder; empty where crfm-helm wrote the run.

    Raises:
        InputError: it is damaged.
    """
    path = folder / REPORT
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}. Run the evaluation again, or delete it.") from error
    if not isinstance(told, dict):
        raise InputError(f"{path} is damaged: it holds no object. Run the evaluation again, or delete it.")
    return told


def require_own_folder(spec: RunSpec, identity: str, suite_folder: Path) -> None:
    """Refuse to put a run where another one lies: of another model, in other bits, or of another task.

    Raises:
        InputError: there is such a run; says where.
    """
    folder = suite_folder / folder_name(spec.name)
    if len(folder.name.encode(errors="surrogatepass")) > _LONGEST_NAME:
        raise InputError(f"{folder.name[:60]}… is too long for a folder's name. Give the run another name.")
    if not (folder / "run_spec.json").exists():
        return
    there, wanted = _json_of(folder / "run_spec.json"), _plain(spec.to_dict())
    before = read_report(folder).get("model_identity", identity)
    differing = [name for name in wanted if _kept(there.get(name), name) != _kept(wanted[name], name)]
    if "chat_template" in there and "chat_template" not in wanted:
        differing.append("chat_template")
    if before != identity:
        differing.append("model")
    if differing:
        raise InputError(
            f"{folder} holds another run of that name: {', '.join(differing)} differ. Name another --output "
            "or --name, or delete that folder."
        )


def _json_of(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}. Delete its folder.") from error


def _kept(value: Any, name: str) -> Any:
    """What tells a run from another: not how many instances it has been asked, nor the model's name."""
    if name != "adapter_spec" or not isinstance(value, dict):
        return value
    left_out = ("max_eval_instances", "model", "model_deployment")
    return {key: each for key, each in value.items() if key not in left_out}


def report_of(evaluated: Evaluated) -> dict[str, Any]:
    """Means with intervals, the time, and what a reader must know."""
    found = evaluated.measurement
    names = sorted({stat.name.name for each in found.per_instance for stat in each.stats})
    intervals = {name: evaluated.interval(name) for name in names}
    return {
        "run": evaluated.spec.name,
        "model_identity": evaluated.model_identity,
        "main_metric": evaluated.main_metric,
        "main_split": evaluated.main_split,
        "shown_metrics": list(evaluated.shown_metrics),
        "seconds": evaluated.seconds,
        "level": evaluated.level,
        "num_requests": len(evaluated.states),
        "num_asked": evaluated.num_asked,
        "num_prompts_cut": sum(state.prompt_truncated for state in evaluated.states),
        "notes": list(evaluated.notes),
        "intervals": {name: each.to_dict() for name, each in intervals.items() if each is not None},
    }


@dataclass(frozen=True, kw_only=True)
class GroupOfRuns:
    """A group of tasks, and the runs of its tasks by the tasks' names."""

    group: TaskGroup
    runs: Mapping[str, str]


def group_reports(groups: Sequence[GroupOfRuns], done: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Of each group: its runs and its averages with intervals, by metric."""
    by_run = {each.spec.name: each for each in done}
    reports = []
    for each in groups:
        own = {scenario.name: by_run[each.runs[scenario.name]] for scenario in each.group.scenarios}
        averages = {}
        for aggregate in each.group.aggregates:
            figures = {name: _figure(run, aggregate.metric) for name, run in own.items()}
            found = aggregate.of({name: figure for name, figure in figures.items() if figure is not None})
            averages[aggregate.metric] = found.to_dict() if found is not None else None
        reports.append(
            {"group": each.group.name, "runs": [run.spec.name for run in own.values()], "averages": averages}
        )
    return reports


def _figure(run: Evaluated, metric: str) -> Interval | None:
    """A task's figure; of a task with one pipeline also where the group names that pipeline."""
    return interval_of(run.measurement, metric) or interval_of(run.measurement, metric.partition(",")[0])


def write_groups(reports: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write each group's report into a file of its name."""
    for each in reports:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / f"{folder_name(each['group'])}.json", each)


def _scenario(spec: RunSpec) -> dict[str, Any]:
    known = next((each for each in SCENARIOS if each.class_name == spec.scenario_spec.class_name), None)
    name = known.name if known else spec.name
    return {
        "name": name,
        "description": known.description if known else "",
        "tags": [],
        "definition_path": spec.scenario_spec.class_name,
    }


def plain_json(content: Any) -> str:
    """Content as one line of JSON; what has no number there, such as the width of one value, is null."""
    return json.dumps(_plain(content), allow_nan=False)


def _plain(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(each) for each in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, (str, int, float, bool, type(None))):
        return content
    return _plain(content.item()) if hasattr(content, "item") else str(content)


def _write(path: Path, content: Any) -> None:
    text = json.dumps(_finite(content), indent=2) + "\n"
    write_atomically(path, text.encode("utf-8", errors="surrogatepass"))


def _finite(content: Any) -> Any:
    """Without NaN and infinities, which JSON does not have."""
    if isinstance(content, dict):
        kept = {key: _finite(value) for key, value in content.items()}
        return {key: value for key, value in kept.items() if value is not None}
    if isinstance(content, (list, tuple)):
        return [_finite(each) for each in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content.item() if hasattr(content, "item") else content


# --- reading ----------------------------------------------------------------------------------------------


def read_run(folder: Path) -> tuple[RunSpec, tuple[RequestState, ...]]:
    """A run's spec and answered requests, ours or crfm-helm's.

    Raises:
        InputError: a file is missing or damaged.
    """
    try:
        told = json.loads((folder / "run_spec.json").read_text())
        state = json.loads((folder / "scenario_state.json").read_text())
        return _run_spec(told), tuple(_state(each) for each in state["request_states"])
    except OSError as error:
        raise InputError(
            f"{error.filename} cannot be read: {error.strerror}. Name a run's folder."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is damaged or of another version: {error!r}.") from error


def _run_spec(told: dict[str, Any]) -> RunSpec:
    adapter = {
        key: value for key, value in told["adapter_spec"].items() if key in AdapterSpec.__dataclass_fields__
    }
    adapter["stop_sequences"] = tuple(adapter.get("stop_sequences", ()))
    adapter["substitutions"] = tuple(tuple(pair) for pair in adapter.get("substitutions", ()))
    augmenter = told.get("data_augmenter_spec", {})
    return RunSpec(
        name=told["name"],
        scenario_spec=ScenarioSpec(**told["scenario_spec"]),
        adapter_spec=AdapterSpec(**adapter),
        metric_specs=tuple(MetricSpec(**each) for each in told["metric_specs"]),
        data_augmenter_spec=AugmenterSpec(
            perturbation_specs=tuple(
                PerturbationSpec(**each) for each in augmenter.get("perturbation_specs", ())
            )
        ),
        groups=tuple(told.get("groups", ())),
        chat=Chat(**told["chat_template"]) if told.get("chat_template") else None,
    )


def _state(told: dict[str, Any]) -> RequestState:
    request, result = told["request"], told.get("result")
    return RequestState(
        instance=_instance(told["instance"]),
        request=Request(
            prompt=request["prompt"],
            max_tokens=request["max_tokens"],
            temperature=request["temperature"],
            num_completions=request["num_completions"],
            top_k_per_token=request["top_k_per_token"],
            stop_sequences=tuple(request.get("stop_sequences", ())),
            echo=request["echo_prompt"],
            continuation=request.get("continuation", ""),
            random=request.get("random"),
            messages=tuple((each["role"], each["content"]) for each in request.get("messages") or ()),
        ),
        train_trial=told["train_trial_index"],
        reference_index=told.get("reference_index"),
        request_mode=told.get("request_mode"),
        output_mapping=told.get("output_mapping"),
        result=_result(result) if result else None,
        num_examples=told.get("num_train_instances", 0),
        prompt_truncated=told.get("prompt_truncated", False),
        num_conditioning_tokens=told.get("num_conditioning_tokens", 0),
    )


def _result(told: dict[str, Any]) -> Result:
    completions = tuple(
        Completion(
            text=each["text"],
            tokens=tuple(Token(token["text"], token["logprob"]) for token in each["tokens"]),
            finish_reason=(each.get("finish_reason") or {}).get("reason", "unknown"),
        )
        for each in told["completions"]
    )
    seconds = told.get("batch_request_time", told.get("request_time", 0.0))
    return Result(completions=completions, seconds=seconds, batch_size=told.get("batch_size"))


_PERTURBATION_FIELDS = {"name", "robustness", "fairness", "computed_on", "seed"}


def _instance(told: dict[str, Any]) -> Instance:
    perturbation = None
    if "perturbation" in told:
        own = {key: value for key, value in told["perturbation"].items() if key in _PERTURBATION_FIELDS}
        rest = tuple(item for item in told["perturbation"].items() if item[0] not in _PERTURBATION_FIELDS)
        perturbation = PerturbationDescription(**own, parameters=rest)
    return Instance(
        input=told["input"]["text"],
        references=tuple(
            Reference(
                text=each["output"]["text"], tags=tuple(each["tags"]), test_cases=each.get("test_cases")
            )
            for each in told.get("references", ())
        ),
        split=told.get("split"),
        sub_split=told.get("sub_split"),
        id=told.get("id"),
        perturbation=perturbation,
        extra=told.get("extra_data", {}),
    )
