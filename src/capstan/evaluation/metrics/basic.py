"""The metrics that nearly every run has: matches, probabilities, tokens, calibration, bits per byte.

Source: HELM, `metrics/basic_metrics.py`, `metrics/language_modeling_metrics.py`.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from urllib.parse import unquote_to_bytes

import numpy as np

from capstan.errors import InputError, unknown_name
from capstan.evaluation.adapters import RequestState
from capstan.evaluation.metrics.aggregation import Answered, InstanceStats, Measurement, by_instance
from capstan.evaluation.metrics.calibration import calibration_stats
from capstan.evaluation.metrics.code import CODE_MEASURES, code_stats
from capstan.evaluation.metrics.efficiency import efficiency_stats
from capstan.evaluation.metrics.stat import Context, Stat, StatName, merge_into, merged, stat
from capstan.evaluation.metrics.text_match import MEASURES
from capstan.evaluation.models import Completion, Token
from capstan.evaluation.token_texts import num_covering

_REASONS = ("length", "stop", "endoftext", "unknown")


def generation_metric(run: Answered, *, names: Sequence[str] = ()) -> Measurement:
    """Of each answer: how well it matches by the measures named, its probability, its cost."""
    unknown = [name for name in names if name not in MEASURES and name not in CODE_MEASURES]
    if unknown:
        raise unknown_name("measure of an answer", unknown[0], [*MEASURES, *CODE_MEASURES])

    def measure(run: Answered, states: Sequence[RequestState]) -> list[Stat]:
        state = states[0]
        stats = request_stats(run, state)
        if state.instance.references:
            stats += reference_stats(run, state, names)
        return stats + probability_stats(state)

    return by_instance(
        run,
        measure,
        wants_references=False,
        derive=perplexity_stats,
        derive_from_instances=calibration_of_instances,
    )


def reference_metric(run: Answered) -> Measurement:
    """Of choices scored one by one: which the model prefers, and how surely.

    Differs: calibration is computed here too. HELM lost it for separately scored choices; its other figures
    stay as they are.
    """
    return by_instance(
        run,
        _preferred,
        wants_references=True,
        derive_from_instances=lambda found: calibration_of_instances(found, needs_logprobs=False),
    )


def _preferred(run: Answered, states: Sequence[RequestState]) -> list[Stat]:
    scores = reference_scores(run, states)
    right = {at for at, each in enumerate(states[0].instance.references) if each.is_correct}
    best = [at for at, score in enumerate(scores) if score >= max(scores)]
    costs = merged(each for state in states for each in request_stats(run, state))
    # The softmax's largest value: every other score is below the largest by what the exponent says.
    surest = 1.0 / sum(math.exp(score - max(scores)) for score in scores)
    return [
        *costs.values(),
        stat("max_prob", surest),
        stat("exact_match", len(right & set(best)) / len(best)),
        stat("predicted_index", best[0]),
    ]


def reference_scores(run: Answered, states: Sequence[RequestState]) -> list[float]:
    """A score for each choice: its log-probability a token, or less what it has without the question."""
    found: dict[tuple[int, str], tuple[float, int]] = {}
    for state in states:
        assert state.reference_index is not None
        assert state.request_mode is not None
        found[state.reference_index, state.request_mode] = _span(run, state)
    indices = range(len(states[0].instance.references))
    if run.spec.method == "multiple_choice_separate_calibrated":
        return [found[at, "original"][0] - found[at, "calibration"][0] for at in indices]
    return [found[at, "original"][0] / found[at, "original"][1] for at in indices]


def _span(run: Answered, state: RequestState) -> tuple[float, int]:
    """The log-probability and number of the tokens that say a choice with what stands before it, a space
    unless a task says otherwise."""
    assert state.result is not None
    assert state.reference_index is not None
    text = state.request.continuation or " " + state.instance.references[state.reference_index].text
    tokens = state.result.completions[0].tokens
    if state.request.is_scored:
        count = num_covering([token.text for token in tokens], text)
    else:  # HELM asks the same of what a ranking generates
        count = len(run.model.encode(text))
    return sum(token.logprob for token in tokens[-count:]), count


# --- parts ------------------------------------------------------------------------------------------------


def request_stats(run: Answered, state: RequestState) -> list[Stat]:
    """What is known of every request: its references, cost, why it ended, whether the prompt was cut."""
    assert state.result is not None
    reason = state.result.completions[0].finish_reason
    reason = reason if reason in _REASONS else "unknown"
    return [
        stat("num_references", len(state.instance.references)),
        stat("num_train_trials", run.spec.num_train_trials),
        *efficiency_stats(run, state),
        *(stat(f"finish_reason_{each}", int(each == reason)) for each in _REASONS),
        stat("num_train_instances", state.num_examples),
        stat("prompt_truncated", int(state.prompt_truncated)),
    ]


def likeliest_first(completions: Sequence[Completion]) -> list[Completion]:
    """Answers ordered by probability; equal ones stay in order."""
    return sorted(completions, key=lambda each: -each.logprob)


def answers_of(run: Answered, state: RequestState) -> list[str | None]:
    """The answers, likeliest first; letters replaced by what they stand for, None if for nothing."""
    assert state.result is not None
    texts = [each.text.strip() for each in likeliest_first(state.result.completions)]
    if state.output_mapping is None:
        return list(texts)
    if run.spec.output_mapping_pattern:
        texts = [_found(run.spec.output_mapping_pattern, text) for text in texts]
    return [state.output_mapping.get(text) for text in texts]


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        return ""
    return str(match.group(1) if match.groups() else match.group(0))


def reference_stats(run: Answered, state: RequestState, names: Sequence[str]) -> list[Stat]:
    """The best match with any right reference: of the likeliest answer, and `@k` of all."""
    assert state.result is not None
    golds = state.instance.all_correct
    if not golds:
        raise InputError(f"The instance {state.instance.id} has references, but none is correct.")
    answers = answers_of(run, state)
    best = likeliest_first(state.result.completions)[0]
    stats = [stat("max_prob", float(np.exp(best.logprob)))]
    for name in names:
        if name in CODE_MEASURES:
            # As they were written: a program's first line needs its indentation.
            written = [each.text for each in likeliest_first(state.result.completions)]
            stats += code_stats(name, run, golds, written)
            continue
        measure = MEASURES[name]
        scores = [
            max(measure(gold.text, answer) if answer is not None else 0.0 for gold in golds)
            for answer in answers
        ]
        stats.append(stat(name, scores[0]))
        if run.spec.num_outputs != 1:
            stats.append(stat(f"{name}@{run.spec.num_outputs}", max(scores)))
    return stats


def probability_stats(state: RequestState) -> list[Stat]:
    """The log-probability, tokens and bytes of an answer, or of a scored text after its context."""
    assert state.result is not None
    tokens = state.result.completions[0].tokens
    if state.num_conditioning_tokens and tokens and tokens[0].text == "":
        tokens = tokens[1:]
    wanted = tokens[state.num_conditioning_tokens :]
    return [
        stat("logprob", sum(token.logprob for token in wanted)),
        stat("num_perplexity_tokens", len(wanted)),
        stat("num_bytes", num_bytes(wanted)),
    ]


_BYTES = re.compile(r"bytes:[^\\]*(?:\\x[0-9a-fA-F]{2})+")


def num_bytes(tokens: Sequence[Token]) -> int:
    r"""Bytes of a text in tokens, of which some stand for bytes, as `bytes:\xe2\x80`, also for part of a
    character.

    Differs: HELM counts three bytes for part of a character.
    """
    return sum(
        len(unquote_to_bytes(text.removeprefix("bytes:").replace("\\x", "%")))
        if _BYTES.fullmatch(text)
        else len(text.encode("utf-8", "surrogatepass"))
        for text, _ in tokens
    )


def perplexity_stats(stats: Mapping[str, Stat]) -> list[Stat]:
    """Perplexity, bits and nats a byte, from sums."""
    if "logprob" not in stats:
        return []
    total = stats["logprob"].sum
    derived = []
    if "num_perplexity_tokens" in stats and stats["num_perplexity_tokens"].sum > 0:
        derived.append(stat("perplexity", math.e ** (-total / stats["num_perplexity_tokens"].sum)))
    if "num_bytes" in stats and stats["num_bytes"].sum > 0:
        size = stats["num_bytes"].sum
        derived += [
            stat("bits_per_byte", -total / size / math.log(2)),
            stat("logprob_per_byte", total / size),
        ]
    return derived


def calibration_of_instances(
    instances: Sequence[Sequence[Stat]], *, needs_logprobs: bool = True
) -> list[Stat]:
    """Calibration over instances; none where the model gave no probabilities, for all would be 1."""
    by_name = [{each.name.name: each for each in stats} for stats in instances]
    if needs_logprobs and not any("logprob" in each and each["logprob"].sum < 0 for each in by_name):
        return []
    known = [each for each in by_name if "max_prob" in each and "exact_match" in each]
    confidences = [float(each["max_prob"].mean or 0.0) for each in known]
    # Half a match, of a tie, counts as wrong.
    right = [int(each["exact_match"].mean or 0.0) for each in known]
    return calibration_stats(confidences, right)


def instances_metric(run: Answered) -> Measurement:
    """How many instances there are of each kind."""
    totals: dict[StatName, Stat] = {}
    for trial in range(run.spec.num_train_trials):
        counts: dict[Context, int] = defaultdict(int)
        for instance in run.instances:
            if run.of(trial, instance):
                counts[Context.of(instance)] += 1
        for context, count in counts.items():
            merge_into(totals, stat("num_instances", count).in_context(context))
    return Measurement(list(totals.values()))


def language_modeling_metric(run: Answered, *, names: Sequence[str] = ()) -> Measurement:
    """Bits per byte of texts in windows; `names` is HELM's, which does not use it either."""
    totals: dict[StatName, Stat] = {}
    per_instance = []
    ids: dict[Context, set[str | None]] = defaultdict(set)
    for state in run.states:
        context = Context.of(state.instance)
        found = [*request_stats(run, state), *probability_stats(state)]
        stats = [each.in_context(context) for each in found]
        ids[context].add(state.instance.id)
        # Of each text too, so that two models can be compared text by text; the run's figure is of the sums.
        own_bits = perplexity_stats({each.name.name: each for each in stats})
        shown = (
            *stats,
            *(each.in_context(context) for each in own_bits if each.name.name == "bits_per_byte"),
        )
        per_instance.append(InstanceStats(instance=state.instance, train_trial=0, stats=shown))
        for each in stats:
            merge_into(totals, each)
    for context in ids:
        own = {name.name: each for name, each in totals.items() if name.context == context}
        for each in (*perplexity_stats(own), stat("num_instances", len(ids[context]))):
            merge_into(totals, each.in_context(context))
    return Measurement([each.only_mean() for each in totals.values()], per_instance)
