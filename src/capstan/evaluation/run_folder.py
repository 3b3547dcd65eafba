"""A run's folder, as crfm-helm writes and reads it, with a report of ours beside.

`runs/<suite>/<run>/` holds run_spec.json, scenario.json, scenario_state.json, stats.json and
per_instance_stats.json; helm-summarize and helm-server take it. What is None or NaN is left out.
`capstan.json` has the intervals, the time and notes.
"""

import json
import math
from pathlib import Path
from typing import Any

from capstan.errors import InputError
from capstan.evaluation.adapters import RequestState
from capstan.evaluation.instances import Instance, PerturbationDescription, Reference
from capstan.evaluation.intervals import interval_of
from capstan.evaluation.models import Completion, Request, Result, Token
from capstan.evaluation.running import Evaluated
from capstan.evaluation.scenarios import SCENARIOS
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


def folder_name(run: str) -> str:
    """A run's name as a folder's."""
    return run.replace("/", "_")


def write_run(evaluated: Evaluated, suite_folder: Path) -> Path:
    """Write a run's folder; each file under another name first, so that none is half."""
    folder = suite_folder / folder_name(evaluated.spec.name)
    folder.mkdir(parents=True, exist_ok=True)
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


def report_of(evaluated: Evaluated) -> dict[str, Any]:
    """Means with intervals, the time, and what a reader must know."""
    found = evaluated.measurement
    names = sorted({stat.name.name for each in found.per_instance for stat in each.stats})
    split = evaluated.main_split or None
    intervals = {name: interval_of(found, name, split) for name in names}
    if not any(intervals.values()):
        intervals = {name: interval_of(found, name) for name in names}
    return {
        "run": evaluated.spec.name,
        "main_metric": evaluated.main_metric,
        "main_split": evaluated.main_split,
        "seconds": evaluated.seconds,
        "num_requests": len(evaluated.states),
        "num_asked": evaluated.num_asked,
        "notes": list(evaluated.notes),
        "intervals": {name: each.to_dict() for name, each in intervals.items() if each is not None},
    }


def _scenario(spec: RunSpec) -> dict[str, Any]:
    known = next((each for each in SCENARIOS if each.class_name == spec.scenario_spec.class_name), None)
    name = known.name if known else spec.name
    return {
        "name": name,
        "description": known.description if known else "",
        "tags": [],
        "definition_path": spec.scenario_spec.class_name,
    }


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
