"""Tasks written for lm-evaluation-harness: its YAML over local files.

Every key of a task is used, says nothing that changes a figure, or is refused by name. Output types:
multiple_choice, generate_until, loglikelihood_rolling. What would run code (`!function`, `process_docs`) is
refused.

Source: lm-evaluation-harness 0.4, `config/task.py`, `docs/task_guide.md`. Its scores: `acc` compares sums of
log-probabilities, `acc_norm` divides by the choice's characters, `acc_bytes` by its bytes, `exact_match`
compares filtered answers.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capstan.errors import CapstanError, InputError, unknown_name
from capstan.evaluation.instances import TEST, TRAIN, Instance
from capstan.evaluation.metrics.answer_filters import pipeline
from capstan.evaluation.metrics.task_answers import PLAIN, stat_name
from capstan.evaluation.scenarios import asking
from capstan.evaluation.scenarios.lm_eval_documents import instance_of, target_of
from capstan.evaluation.scenarios.scenario import DataFolder, Scenario
from capstan.evaluation.scenarios.tables import read_yaml, rows_of
from capstan.evaluation.specs import AdapterSpec, MetricSpec, RunSpec, ScenarioSpec

TASK_CLASS = "capstan.evaluation.scenarios.lm_eval_tasks.TaskScenario"
SAMPLERS = ("default", "first_n")
_TYPES = ("multiple_choice", "generate_until", "loglikelihood_rolling")
_USED = {
    "task", "dataset_path", "dataset_kwargs", "training_split", "validation_split", "test_split",
    "fewshot_split", "fewshot_config", "num_fewshot", "doc_to_text", "doc_to_target", "doc_to_choice",
    "description", "target_delimiter", "fewshot_delimiter", "gen_prefix", "output_type", "generation_kwargs",
    "repeats", "filter_list", "metric_list",
}  # fmt: skip
# They name or describe, and change no figure.
_DESCRIBING = {"task_alias", "tag", "group", "metadata", "dataset_name", "doc_to_decontamination_query"}
_REFUSED = {
    "process_docs": "it would run code; change the file of data instead",
    "process_results": "it would run code",
    "custom_dataset": "it would run code",
    "unsafe_code": "code is not run",
    "use_prompt": "promptsource is not taken over; write doc_to_text",
    "doc_to_image": "only texts are asked",
    "doc_to_audio": "only texts are asked",
    "should_decontaminate": "overlap with training data is not looked for",
}
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_METRICS = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes"),
    "generate_until": ("exact_match",),
    "loglikelihood_rolling": ("bits_per_byte",),
}
_OPTIONS = {
    "regexes_to_ignore": list, "ignore_case": bool, "ignore_punctuation": bool, "ignore_numbers": bool,
}  # fmt: skip
_FORMATS = ("json", "csv", "parquet")


def read_task(path: Path, above: Sequence[Path] = ()) -> dict[str, Any]:
    """A task's mapping, what it includes put under it.

    Raises:
        InputError: a file is missing, no YAML, or includes itself.
    """
    told = read_yaml(path)
    base = told.pop("include", None)
    if base is None:
        return told
    if path.resolve() in above:
        raise InputError(f"{path} includes itself.")
    found: dict[str, Any] = {}
    for each in base if isinstance(base, list) else [base]:
        found |= read_task(path.parent / str(each), (*above, path.resolve()))
    return found | told


def is_task(told: Mapping[str, Any]) -> bool:
    """Whether a YAML's mapping is a task of lm-evaluation-harness."""
    return "include" in told or "task" in told


def lm_eval_scenario(path: Path) -> Scenario:
    """The scenario of a task's YAML file.

    Raises:
        InputError: something that cannot be taken over; says what.
    """
    told = _checked(read_task(path), path)
    kind = str(told["output_type"])
    filters, name = _filters(told, kind, path), str(told["task"])
    metric_specs, main = _metrics(told, kind, filters, path)
    spec = RunSpec(
        name=name,
        scenario_spec=ScenarioSpec(class_name=TASK_CLASS, args={"path": str(path)}),
        adapter_spec=_adapter(told, kind, path),
        metric_specs=metric_specs,
        groups=(name,),
    )
    return Scenario(
        name=name,
        folder="",
        class_name=TASK_CLASS,
        description=f"lm-evaluation-harness: {name}",
        load=load_task,
        run_spec=lambda: spec,
        main_metric=main,
    )


def _checked(told: dict[str, Any], path: Path) -> dict[str, Any]:
    """A task of which every key is known, with its defaults."""
    for key, value in told.items():
        if key in _REFUSED and value not in (None, False):
            raise InputError(f"{path}: {key} cannot be taken over: {_REFUSED[key]}.")
        if key not in _USED | _DESCRIBING | set(_REFUSED):
            raise InputError(f"{path}: {unknown_name('key of a task', str(key), _USED | _DESCRIBING)}")
    found = {key: value for key, value in told.items() if value is not None}
    found = {"output_type": "generate_until", "target_delimiter": " ", "fewshot_delimiter": "\n\n"} | found
    kind = found["output_type"]
    if kind not in _TYPES:
        raise InputError(f"{path}: the output_type {kind!r} cannot be taken over; {', '.join(_TYPES)} can.")
    if kind == "loglikelihood_rolling":
        found.setdefault("doc_to_text", "")
    needed = {"task", "doc_to_text", "doc_to_target"} | (
        {"doc_to_choice"} if kind == "multiple_choice" else set()
    )
    if missing := sorted(needed - set(found)):
        raise InputError(f"{path} lacks {', '.join(missing)}, which a task of the type {kind} needs.")
    for key in ("description", "target_delimiter", "fewshot_delimiter", "gen_prefix"):
        if not isinstance(found.get(key, ""), str):
            raise InputError(f"{path}: {key} must be a text, not {found[key]!r}.")
    return found


def _whole(value: Any, key: str, path: Path, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{path}: {key} must be a whole number of at least {least}, not {value!r}.")
    return value


def _adapter(told: Mapping[str, Any], kind: str, path: Path) -> AdapterSpec:
    shots = _whole(told.get("num_fewshot", 0), "num_fewshot", path, 0)
    repeats = _whole(told.get("repeats", 1), "repeats", path, 1)
    if kind != "generate_until":
        for key, given in (
            ("repeats", repeats != 1),
            ("generation_kwargs", bool(told.get("generation_kwargs"))),
        ):
            if given:
                raise InputError(f"{path}: {key} means nothing for the type {kind}; leave it out.")
    if kind == "loglikelihood_rolling":
        if shots:
            raise InputError(f"{path}: num_fewshot means nothing for the type {kind}; leave it out.")
        return asking.language_modeling()
    how = _generation(told, path)
    _sampler(told, path)
    return AdapterSpec(
        method="multiple_choice_separate_original" if kind == "multiple_choice" else "generation",
        input_suffix="",
        output_prefix=told["target_delimiter"],
        output_suffix=told["fewshot_delimiter"],
        instance_prefix="",
        max_train_instances=shots,
        sample_train=_sampler(told, path) == "default",
        num_outputs=repeats,
        **(how if kind == "generate_until" else {"temperature": 0.0, "max_tokens": 0}),
    )


def _generation(told: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """How a task generates: greedily until a blank line unless it says otherwise."""
    how = dict(_mapping(told, "generation_kwargs", path))
    until = how.pop("until", None)
    until = [told["fewshot_delimiter"]] if until is None else [until] if isinstance(until, str) else until
    if not isinstance(until, list) or not all(isinstance(each, str) and each for each in until):
        raise InputError(
            f"{path}: generation_kwargs: until must be a text or a list of texts, not {until!r}."
        )
    lengths = [how.pop(key) for key in _LENGTHS if key in how]
    temperature, does_sample = how.pop("temperature", 0.0), how.pop("do_sample", None)
    if not isinstance(temperature, (int, float)) or isinstance(temperature, bool) or temperature < 0:
        raise InputError(f"{path}: generation_kwargs: temperature must be 0 or more, not {temperature!r}.")
    if does_sample is True and temperature == 0:
        raise InputError(f"{path}: generation_kwargs: do_sample wants a temperature above 0.")
    neutral = {"top_p": 1.0, "num_beams": 1, "repetition_penalty": 1.0, "top_k": 0}
    for key, value in how.items():
        if key not in neutral or value not in (neutral[key], None):
            raise InputError(
                f"{path}: generation_kwargs: {key}: {value!r} cannot be taken over; until, do_sample, "
                f"temperature and {_LENGTHS[0]} can."
            )
    return {
        "temperature": 0.0 if does_sample is False else float(temperature),
        "max_tokens": _whole(lengths[0] if lengths else 256, f"generation_kwargs: {_LENGTHS[0]}", path, 1),
        "stop_sequences": tuple(until),
    }


def _mapping(told: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    found = told.get(key) or {}
    if not isinstance(found, dict):
        raise InputError(f"{path}: {key} must be a mapping, not {found!r}.")
    return found


def _sampler(told: Mapping[str, Any], path: Path) -> str:
    how = _mapping(told, "fewshot_config", path)
    known = ("sampler", "samples", "split", "doc_to_text", "doc_to_target", "doc_to_choice",
             "target_delimiter", "fewshot_delimiter", "gen_prefix")  # fmt: skip
    for key in how:
        if key not in known:
            raise InputError(f"{path}: {unknown_name('key of fewshot_config', str(key), known)}")
    for key in ("target_delimiter", "fewshot_delimiter", "gen_prefix"):
        if key in how and how[key] != told.get(key):
            raise InputError(f"{path}: fewshot_config: {key} can only be the task's own, {told.get(key)!r}.")
    name = how.get("sampler") or "default"
    if name not in SAMPLERS:
        raise InputError(f"{path}: fewshot_config: {unknown_name('sampler', str(name), SAMPLERS)}")
    return str(name)


def _filters(told: Mapping[str, Any], kind: str, path: Path) -> list[dict[str, Any]]:
    """A task's pipelines; where it names none, its first answer is judged."""
    found = told.get("filter_list")
    if not found:
        return [{"name": PLAIN, "filter": [{"function": "take_first"}]}]
    if kind != "generate_until":
        raise InputError(f"{path}: filter_list is taken over for generate_until only, not for {kind}.")
    is_named = isinstance(found, list) and all(
        isinstance(each, dict) and set(each) <= {"name", "filter", "metric_list"} and "name" in each
        and isinstance(each.get("filter"), list) and all(isinstance(step, dict) for step in each["filter"])
        for each in found
    )  # fmt: skip
    if not is_named:
        raise InputError(f"{path}: filter_list must hold pipelines, each with a name and a list in filter.")
    for each in found:
        if "metric_list" in each:
            raise InputError(f"{path}: filter_list: metric_list of a pipeline cannot be taken over.")
        try:
            pipeline(each["filter"])
        except CapstanError as error:
            raise InputError(f"{path}: filter_list: {error}") from error
    return [{"name": str(each["name"]), "filter": each["filter"]} for each in found]


def _metrics(
    told: Mapping[str, Any], kind: str, filters: Sequence[Mapping[str, Any]], path: Path
) -> tuple[tuple[MetricSpec, ...], str]:
    """What is measured, and which of it is shown first."""
    wanted = told.get("metric_list") or [{"metric": _METRICS[kind][0]}]
    if not isinstance(wanted, list) or not all(isinstance(each, dict) for each in wanted):
        raise InputError(f"{path}: metric_list must hold mappings with a metric each, not {wanted!r}.")
    options = dict(_metric(each, kind, path) for each in wanted)
    main = next(iter(options))
    if kind == "generate_until":
        first = stat_name(str(filters[0]["name"]), filters)
        judged = asking.metric("choice_metrics.TaskAnswerMetric", filters=filters, ignoring=options[main])
        return (judged, *asking.basic()), first
    own = (asking.metric("choice_metrics.ChoiceMetric"), *asking.basic())
    return (own if kind == "multiple_choice" else asking.texts()), main


def _metric(told: Mapping[str, Any], kind: str, path: Path) -> tuple[str, dict[str, Any]]:
    """A metric's name and options."""
    name = told.get("metric")
    if name not in _METRICS[kind]:
        known = ", ".join(_METRICS[kind])
        raise InputError(f"{path}: metric_list: {name!r} cannot be taken over for {kind}; {known} can.")
    options = {key: value for key, value in told.items() if key not in ("metric", "higher_is_better")}
    aggregation = options.pop("aggregation", None)
    if aggregation not in (None, "mean", name):
        raise InputError(
            f"{path}: metric_list: {name}: the aggregation {aggregation!r} cannot be taken over; mean can."
        )
    if options.get("hf_evaluate") is False:
        del options["hf_evaluate"]
    for key, value in options.items():
        if name != "exact_match" or key not in _OPTIONS:
            raise InputError(
                f"{path}: metric_list: {name}: the option {key}: {value!r} cannot be taken over."
            )
        if value is not None and not isinstance(value, _OPTIONS[key]):
            raise InputError(f"{path}: metric_list: {key} must be a {_OPTIONS[key].__name__}, not {value!r}.")
    for pattern in options.get("regexes_to_ignore") or ():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise InputError(f"{path}: regexes_to_ignore: {pattern!r} is no regular expression.") from error
    return str(name), {key: value for key, value in options.items() if value is not None}


# --- data -------------------------------------------------------------------------------------------------


def load_task(_: DataFolder, *, path: str) -> list[Instance]:
    """A task's instances: those that examples are taken from as training, its test split (else validation)
    asked.
    """
    where = Path(path)
    told = _checked(read_task(where), where)
    files = _files(told, where)
    asked = told.get("test_split") or told.get("validation_split")
    if asked is None:
        raise InputError(f"{path} names neither test_split nor validation_split: nothing is asked.")
    if told["output_type"] == "loglikelihood_rolling":
        return [
            Instance(input=str(target_of(told, row, label)), split=TEST)
            for row, label in _rows(files, asked, where)
        ]
    place = {"shares_split": told.get("fewshot_split") == told.get("test_split")}
    questions = [
        instance_of(told, row, TEST, label, place | {"position": at})
        for at, (row, label) in enumerate(_rows(files, asked, where))
    ]
    return _examples(told, files, where, asked) + questions


def _examples(
    told: Mapping[str, Any], files: Mapping[str, list[Path]], path: Path, asked: str
) -> list[Instance]:
    how = _mapping(told, "fewshot_config", path)
    own = dict(told) | {
        key: how[key] for key in ("doc_to_text", "doc_to_target", "doc_to_choice") if key in how
    }
    samples = how.get("samples")
    if samples is not None:
        if not isinstance(samples, list) or not all(isinstance(each, dict) for each in samples):
            raise InputError(f"{path}: fewshot_config: samples must be a list of documents, not {samples!r}.")
        rows = [(each, f"{path}, sample {number}") for number, each in enumerate(samples, 1)]
    else:
        shown = told.get("fewshot_split") or how.get("split") or told.get("training_split")
        # As in the harness validation documents are shown where there is no training split.
        shown = shown or (told.get("validation_split") if told.get("validation_split") != asked else None)
        if shown is None:
            return []
        rows = _rows(files, str(shown), path)
    return [instance_of(own, row, TRAIN, label, {}) for row, label in rows]


def _files(told: Mapping[str, Any], path: Path) -> dict[str, list[Path]]:
    """A task's local files by split."""
    settings = dict(_mapping(told, "dataset_kwargs", path))
    files, kind = settings.pop("data_files", None), told.get("dataset_path")
    if not files:
        raise InputError(
            f"{path} names no local files. Set dataset_path: json and dataset_kwargs: {{data_files: "
            f"{{test: …}}}}."
        )
    if kind is not None and kind not in _FORMATS:
        raise InputError(
            f"{path}: dataset_path: {kind!r} is no kind of local files; {', '.join(_FORMATS)} are."
        )
    if settings:
        raise InputError(f"{path}: dataset_kwargs: {', '.join(map(str, settings))} cannot be taken over.")
    named = files if isinstance(files, dict) else {"train": files}  # as in Hugging Face datasets
    return {
        str(split): [path.parent / str(each) for each in (found if isinstance(found, list) else [found])]
        for split, found in named.items()
    }


def _rows(files: Mapping[str, list[Path]], split: str, path: Path) -> list[tuple[Mapping[str, Any], str]]:
    """A split's documents, each with where it stands."""
    if split not in files:
        raise InputError(f"{path}: data_files has no split {split!r}; it has {', '.join(files)}.")
    return [
        (row, f"{file.name}, row {number}")
        for file in files[split]
        for number, row in enumerate(rows_of(file), 1)
    ]
