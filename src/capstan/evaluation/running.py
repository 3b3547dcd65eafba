"""Running: from a run's spec to its statistics, in phases that can be looked at one by one.

prepare   instances are loaded, sampled, perturbed and made into requests; nothing is asked yet
answer    what is not known yet is asked, all of a kind together; answers are kept as they come
measure   statistics are computed; this needs no model, and can be done again (`rescore`)
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from capstan.evaluation.adapters import RequestState, adapt
from capstan.evaluation.answer_store import AnswerStore, request_key
from capstan.evaluation.chat import in_chat, num_chat_tokens
from capstan.evaluation.instances import EVAL_SPLITS, TRAIN, Instance
from capstan.evaluation.intervals import LEVEL, Interval, interval_of
from capstan.evaluation.metrics import PROGRAM_MEASURES, Answered, Measurement, measure_run
from capstan.evaluation.models import Completion, LanguageModel, Pair, Result, Scored
from capstan.evaluation.perturbations import WordFiles, augmented
from capstan.evaluation.scenarios import Scenario, load_instances
from capstan.evaluation.scenarios.lm_eval_tasks import TASK_CLASS
from capstan.evaluation.specs import SCORED, RunSpec
from capstan.evaluation.task_prompts import adapt_task

OnAnswered = Callable[[int, int], None]
"""Hears how many requests are answered, and of how many."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run whose requests are made but not answered. `num_eval` instances could have been asked."""

    spec: RunSpec
    instances: tuple[Instance, ...]
    states: tuple[RequestState, ...]
    num_eval: int
    words: WordFiles


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A run that is done.

    `level` is that of intervals: more than 95 % where they were looked at several times, so that all looks
    together are right with 95 %.
    """

    spec: RunSpec
    states: tuple[RequestState, ...]
    measurement: Measurement
    seconds: float = 0.0
    num_asked: int = 0
    num_known: int = 0
    notes: tuple[str, ...] = ()
    main_metric: str = ""
    main_split: str = ""
    shown_metrics: tuple[str, ...] = ()
    model_identity: str = ""
    level: float = LEVEL

    def interval(self, name: str) -> Interval | None:
        """A metric's interval on the main split, or on all where that has none."""
        of_main = interval_of(self.measurement, name, self.main_split or None, level=self.level)
        return of_main or interval_of(self.measurement, name, level=self.level)


def sampled(instances: Sequence[Instance], count: int | None) -> list[Instance]:
    """All training instances, and `count` of the others: those that HELM draws, in its order.

    They are the first of `RandomState(0).permutation`, so more of them contain fewer of them.
    """
    train = [instance for instance in instances if instance.split == TRAIN]
    evaluated = [instance for instance in instances if instance.split in EVAL_SPLITS]
    if count is None or len(evaluated) <= count:
        return train + evaluated
    order = np.random.RandomState(0).permutation(len(evaluated))[:count]
    return train + [evaluated[at] for at in order]


def prepare(
    spec: RunSpec,
    model: LanguageModel,
    *,
    root: Path | None = None,
    scenario: Scenario | None = None,
    uses_hub: bool = False,
) -> Prepared:
    """Make a run's requests.

    Raises:
        InputError: data are missing or not what they should be.
        UsageError: the spec names something that there is not.
    """
    words = WordFiles.read(root / "perturbations" if root is not None else None)
    spec = spec.with_adapter(
        model=spec.adapter_spec.model or model.name,
        model_deployment=spec.adapter_spec.model_deployment or model.name,
    )
    instances = load_instances(spec.scenario_spec, root, uses_hub=uses_hub, scenario=scenario)
    num_eval = sum(instance.split in EVAL_SPLITS for instance in instances)
    chosen = sampled(instances, spec.adapter_spec.max_eval_instances)
    chosen = augmented(chosen, spec.data_augmenter_spec, words)
    states = _asked_for(spec, chosen, model)
    return Prepared(spec=spec, instances=tuple(chosen), states=tuple(states), num_eval=num_eval, words=words)


def _asked_for(spec: RunSpec, instances: Sequence[Instance], model: LanguageModel) -> list[RequestState]:
    if spec.scenario_spec.class_name == TASK_CLASS and spec.adapter_spec.method != "language_modeling":
        return adapt_task(spec.adapter_spec, instances, model, spec.chat)
    if spec.chat is None:
        return adapt(spec.adapter_spec, instances, model)
    states = adapt(spec.adapter_spec, instances, model, num_reserved=num_chat_tokens(model, spec.chat))
    return [in_chat(state, model, spec.chat) for state in states]


def answer(
    states: Sequence[RequestState],
    model: LanguageModel,
    store: AnswerStore,
    *,
    on_answered: OnAnswered | None = None,
) -> tuple[RequestState, ...]:
    """The same requests with their results; each distinct one is asked once, if it is not known yet."""
    keys = [request_key(model.identity, state.request) for state in states]
    open_states = {key: state for key, state in zip(keys, states, strict=True) if key not in store}
    num_all, num_done = len(set(keys)), len(set(keys)) - len(open_states)
    if on_answered is not None:
        on_answered(num_done, num_all)
    try:
        for key, result in _asked(open_states, model):
            store.add(key, result)
            num_done += 1
            if on_answered is not None:
                on_answered(num_done, num_all)
    finally:
        store.sync()
    return tuple(replace(state, result=store[key]) for key, state in zip(keys, states, strict=True))


def _asked(states: Mapping[str, RequestState], model: LanguageModel) -> Iterator[tuple[str, Result]]:
    """Results by key: scored choices in one pass, texts in another, then what is generated.

    The seconds of a scored request are those since the result before it, so that together they are what was
    spent: where the model scores in batches, the first of a batch has the time of all.
    """
    kinds: dict[str, list[tuple[str, RequestState]]] = {"score": [], "rolling": [], "generate": []}
    for key, state in states.items():
        request = state.request
        kind = "generate" if not request.is_scored else "score" if request.continuation else "rolling"
        kinds[kind].append((key, state))
    pairs = [_pair(state) for _, state in kinds["score"]]
    texts = [state.request.prompt for _, state in kinds["rolling"]]
    for kind, results in (("score", model.score(pairs)), ("rolling", model.score_rolling(texts))):
        if kinds[kind]:
            for index, scored, seconds in _timed(results):
                key, state = kinds[kind][index]
                yield key, _as_result(state.request.prompt, scored, seconds)
    requests = [
        replace(state.request, random=state.request.random or _seed(key)) for key, state in kinds["generate"]
    ]
    if requests:
        for index, result in model.generate(requests):
            yield kinds["generate"][index][0], result


def _pair(state: RequestState) -> Pair:
    prompt, continuation = state.request.prompt, state.request.continuation
    if prompt.endswith(continuation):
        return Pair(prompt[: len(prompt) - len(continuation)], continuation)
    # Without a space before it, as where the question is empty.
    return Pair(prompt[: len(prompt) - len(continuation.lstrip())], continuation.lstrip())


def _seed(key: str) -> str:
    """The same request is drawn alike wherever and whenever it is asked."""
    return str(int(hashlib.sha256(key.encode()).hexdigest()[:8], 16))


def _timed(results: Iterator[tuple[int, Scored]]) -> Iterator[tuple[int, Scored, float]]:
    """Each result with the seconds since the one before; what the caller does with it counts for nothing."""
    start_s = time.perf_counter()
    for index, scored in results:
        yield index, scored, time.perf_counter() - start_s
        start_s = time.perf_counter()


def _as_result(text: str, scored: Scored, seconds: float) -> Result:
    completion = Completion(text=text, tokens=scored.tokens, finish_reason="length")
    return Result(completions=(completion,), seconds=seconds)


def measure(
    spec: RunSpec,
    states: Sequence[RequestState],
    model: LanguageModel,
    resources: Mapping[str, Any] | None = None,
) -> Measurement:
    """A run's statistics from its answers."""
    run = Answered(spec.adapter_spec, states, model, resources or {})
    return measure_run(run, spec.metric_specs)


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """What runs have in common: the model, where data and answers lie, what metrics may use.

    evaluator = Evaluator(model=model, store=store, root=Path("data"))
    evaluated = evaluator.run(run_spec_of("gsm:max_eval_instances=100"))
    """

    model: LanguageModel
    store: AnswerStore
    root: Path | None = None
    uses_hub: bool = False
    resources: Mapping[str, Any] = field(default_factory=dict)

    def run(
        self,
        spec: RunSpec,
        *,
        scenario: Scenario | None = None,
        on_answered: OnAnswered | None = None,
    ) -> Evaluated:
        """Prepare, answer and measure a run."""
        start_s = time.perf_counter()
        prepared = prepare(spec, self.model, root=self.root, scenario=scenario, uses_hub=self.uses_hub)
        num_before = len(self.store)
        states = answer(prepared.states, self.model, self.store, on_answered=on_answered)
        num_asked = len(self.store) - num_before
        measurement = measure(prepared.spec, states, self.model, self.resources)
        main, *shown = _shown(scenario, measurement) if scenario is not None else [""]
        return Evaluated(
            spec=prepared.spec,
            states=states,
            measurement=measurement,
            seconds=time.perf_counter() - start_s,
            num_asked=num_asked,
            num_known=len(states) - num_asked,
            notes=(*getattr(self.model, "notes", ()), *_notes(prepared, states, self.resources)),
            main_metric=main,
            main_split=scenario.main_split if scenario is not None else "",
            shown_metrics=tuple(shown),
            model_identity=self.model.identity,
        )


def _shown(scenario: Scenario, measurement: Measurement) -> list[str]:
    """The metrics to show, the main one first: of a scenario's those that the run has, for it may be of a
    kind that has others (APPS beside HumanEval). Without any, the scenario's own main metric, n/a."""
    measured = {stat.name.name for each in measurement.per_instance for stat in each.stats}
    names = (scenario.main_metric, *scenario.shown_metrics)
    return [name for name in names if name in measured] or [scenario.main_metric]


def _notes(
    prepared: Prepared, states: Sequence[RequestState], resources: Mapping[str, Any]
) -> tuple[str, ...]:
    """What a reader of the figures must know."""
    notes = []
    kinds = {spec.short_name for spec in prepared.spec.data_augmenter_spec.perturbation_specs}
    needed = {
        "correct_to_misspelling.json": {"MildMixPerturbation", "MisspellingPerturbation"},
        "SAE_to_AAVE_mapping.json": {"DialectPerturbation"},
        "person_names.txt": {"PersonNamePerturbation"},
    }
    for name, used_by in needed.items():
        if kinds & used_by and name not in prepared.words.found:
            notes.append(f"perturbations drew from a short list instead of {name}")
    metrics = {spec.short_name for spec in prepared.spec.metric_specs}
    if "ToxicityMetric" in metrics and not resources.get("toxicity_scorer"):
        notes.append("toxicity: n/a, no scorer was given")
    measures = {name for each in prepared.spec.metric_specs for name in each.args.get("names", ())}
    if measures & set(PROGRAM_MEASURES) and not resources.get("allow_code_execution"):
        notes.append("programs were not run; --allow-code-execution runs them")
    asked = prepared.spec.adapter_spec
    if asked.method in SCORED and (asked.temperature or asked.max_tokens or asked.stop_sequences):
        notes.append("temperature, max_tokens and stop mean nothing: answers are scored, not generated")
    if prepared.spec.chat is not None and asked.method != "language_modeling":
        notes.append("prompts are written by the model's chat template")
    truncated = sum(state.prompt_truncated for state in states)
    if truncated:
        notes.append(f"{truncated:,} of {len(states):,} prompts did not fit and were cut")
    return (*notes, *_notes_on_form(states))


def _notes_on_form(states: Sequence[RequestState]) -> list[str]:
    """How many answers were not of the form asked for, so that a 0 is no lack of knowledge alone."""
    answers = [(state, state.result.completions[0]) for state in states if state.result is not None]
    lettered = [(state.output_mapping, each.text) for state, each in answers if state.output_mapping]
    others = sum(text.strip() not in letters for letters, text in lettered)
    ended = [each.finish_reason for state, each in answers if state.request.stop_sequences]
    endless = sum(reason == "length" for reason in ended)
    notes = []
    if others and all(state.request.max_tokens == 1 for state, _ in answers):
        notes.append(f"{others:,} of {len(lettered):,} answers were none of the letters asked for")
    if endless:
        notes.append(f"{endless:,} of {len(ended):,} answers did not end as examples do, but at max_tokens")
    return notes
