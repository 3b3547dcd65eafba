"""Tasks written for lm-evaluation-harness: its YAML over local files.

Taken over: `doc_to_text`, `doc_to_choice`, `doc_to_target` (field names or Jinja, rendered in a sandbox),
`num_fewshot` with the first examples in order, `description`, delimiters, `generation_kwargs`, the output
types multiple_choice, generate_until and loglikelihood_rolling. Refused with a clear word: `!function`, other
types.

Scores are that project's: `acc` compares sums of log-probabilities, `acc_norm` divides by the choice's bytes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capstan.errors import InputError, require_extra
from capstan.evaluation.instances import TEST, TRAIN, Instance, choices, correct
from capstan.evaluation.scenarios import asking
from capstan.evaluation.scenarios.scenario import DataFolder, Scenario
from capstan.evaluation.scenarios.tables import read_yaml, rows_of
from capstan.evaluation.specs import AdapterSpec, RunSpec, ScenarioSpec

TASK_CLASS = "capstan.evaluation.scenarios.lm_eval_tasks.TaskScenario"
_TYPES = ("multiple_choice", "generate_until", "loglikelihood_rolling")


def lm_eval_scenario(path: Path, *, num_fewshot: int | None = None) -> Scenario:
    """The scenario of a task's YAML file. `num_fewshot` goes before the file's own.

    Raises:
        InputError: something that cannot be taken over; says what.
    """
    told = read_yaml(path)
    kind = told.get("output_type", "generate_until")
    if kind not in _TYPES:
        raise InputError(f"{path}: the output_type {kind!r} cannot be taken over; {', '.join(_TYPES)} can.")
    if "task" not in told:
        raise InputError(f"{path} names no task: it is no task of lm-evaluation-harness.")
    shots = num_fewshot if num_fewshot is not None else int(told.get("num_fewshot") or 0)
    spec = RunSpec(
        name=str(told["task"]),
        scenario_spec=ScenarioSpec(class_name=TASK_CLASS, args={"path": str(path)}),
        adapter_spec=_adapter(told, kind, shots),
        metric_specs=_metrics(kind),
        groups=(str(told["task"]),),
    )
    main = {"multiple_choice": "acc", "generate_until": "exact_match"}.get(kind, "bits_per_byte")
    return Scenario(
        name=str(told["task"]),
        folder="",
        class_name=TASK_CLASS,
        description=f"lm-evaluation-harness: {told['task']}",
        load=load_task,
        run_spec=lambda: spec,
        main_metric=main,
    )


def _adapter(told: Mapping[str, Any], kind: str, shots: int) -> AdapterSpec:
    if kind == "loglikelihood_rolling":
        return asking.language_modeling()
    how = dict(told.get("generation_kwargs") or {})
    until = how.get("until", ["\n\n"])
    return AdapterSpec(
        method="multiple_choice_separate_original" if kind == "multiple_choice" else "generation",
        global_prefix=str(told.get("description") or ""),
        input_suffix="",
        output_prefix=str(told.get("target_delimiter", " ")),
        output_suffix="",
        instance_prefix=str(told.get("fewshot_delimiter", "\n\n")),
        max_train_instances=shots,
        sample_train=False,
        num_outputs=1,
        temperature=float(how.get("temperature", 0.0)),
        max_tokens=0 if kind == "multiple_choice" else int(how.get("max_gen_toks", 256)),
        stop_sequences=tuple([until] if isinstance(until, str) else until),
    )


def _metrics(kind: str) -> tuple[Any, ...]:
    if kind == "multiple_choice":
        return (asking.metric("choice_metrics.ChoiceMetric"), *asking.basic())
    return asking.texts() if kind == "loglikelihood_rolling" else asking.f1()


def load_task(_: DataFolder, *, path: str) -> list[Instance]:
    """A task's instances: its few-shot split for training, its test split (or validation) asked."""
    where = Path(path)
    told = read_yaml(where)
    files = (told.get("dataset_kwargs") or {}).get("data_files")
    if not files:
        raise InputError(
            f"{path} names no local files. Set dataset_path: json and dataset_kwargs: {{data_files: "
            f"{{test: …}}}}."
        )
    named = files if isinstance(files, dict) else {"test": files}
    asked = told.get("test_split") or told.get("validation_split") or next(iter(named))
    shown = told.get("fewshot_split") or told.get("training_split")
    instances = []
    for name, split in ((shown, TRAIN), (asked, TEST)):
        if name is None:
            continue
        if name not in named:
            raise InputError(f"{path}: data_files has no split {name!r}; it has {', '.join(named)}.")
        rows = rows_of(where.parent / (named[name] if isinstance(named[name], str) else named[name][0]))
        instances += [_instance(told, row, split) for row in rows]
    return instances


def _instance(told: Mapping[str, Any], row: Mapping[str, Any], split: str) -> Instance:
    text, target = rendered(told["doc_to_text"], row), rendered(told.get("doc_to_target", ""), row)
    if "doc_to_choice" not in told:
        return Instance(input=str(text), references=(correct(str(target)),), split=split)
    options = rendered(told["doc_to_choice"], row)
    if isinstance(options, str):
        raise InputError(f"doc_to_choice must give a list, not {options!r}.")
    listed = [str(option) for option in options]
    is_index = isinstance(target, int) or (str(target).isdigit() and str(target) not in listed)
    return Instance(
        input=str(text),
        references=choices(listed, int(target) if is_index else listed.index(str(target))),
        split=split,
    )


def rendered(template: Any, row: Mapping[str, Any]) -> Any:
    """A field's value where the template names one, else the template filled by Jinja in its sandbox."""
    if not isinstance(template, str):
        return template
    if template in row:
        return row[template]
    require_extra("evaluation", "jinja2")
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        text = environment.from_string(template).render(**row)
    except TemplateError as error:
        raise InputError(f"The template {template!r} cannot be filled: {error}") from error
    return _literal(text) if text.startswith("[") else text


def _literal(text: str) -> Any:
    import ast

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
