"""Ranking passages by whether the model says that they answer the query.

A "yes" comes before a "no" before anything else; among yeses the surer first, among noes the less sure.

    RR@k = 1 / rank of the first relevant passage among the first k
    NDCG@k = DCG@k / DCG@k of the best order,  DCG@k = sum of grade / log2(rank + 1)

Source: HELM, `metrics/ranking_metrics.py`; trec_eval's `recip_rank`, `ndcg_cut`, `success`, `recall`.
"""

import math
from collections.abc import Mapping, Sequence

from capstan.errors import UsageError
from capstan.evaluation.adapters import RequestState
from capstan.evaluation.metrics.aggregation import Answered, Measurement, by_instance
from capstan.evaluation.metrics.stat import Stat, stat

_NAMES = {"recip_rank": "RR", "ndcg_cut": "NDCG", "success": "Success", "recall": "Recall"}


def ranking_metric(
    run: Answered,
    *,
    method: str = "ranking_binary",
    measure_names: Sequence[str] = ("recip_rank.10",),
    correct_output: str = "Yes",
    wrong_output: str = "No",
    rank: int | None = None,
    multiple_relevance_values: bool = False,
) -> Measurement:
    """Of each query: its measures over all passages, and over those that `rank` of the retriever keeps."""
    if method != "ranking_binary":
        raise UsageError(f"Passages are ranked by the method ranking_binary, not {method!r}.")

    def measure(_: Answered, states: Sequence[RequestState]) -> list[Stat]:
        ordered = sorted(
            states, key=lambda each: _preference(each, correct_output, wrong_output), reverse=True
        )
        order = [state.reference_index or 0 for state in ordered]
        references = states[0].instance.references
        grades = {at: grade for at, each in enumerate(references) if (grade := each.tag_value("relevance"))}
        # Where grades go beyond 1, a 1 is no answer: relevant to the topic only.
        least = 2 if multiple_relevance_values else 1
        kept = [at for at in order if rank and (references[at].tag_value("rank") or rank + 1) <= rank]
        stats = [_measured(name, order, grades, least, "") for name in measure_names]
        if rank:
            stats += [_measured(name, kept, grades, least, f" (topk={rank})") for name in measure_names]
        return stats + [stat(f"ref{at}_rank", place) for place, at in enumerate(order)]

    return by_instance(run, measure, wants_references=True)


def _preference(state: RequestState, yes: str, no: str) -> tuple[int, float]:
    assert state.result is not None
    completion = state.result.completions[0]
    said = completion.text.strip().lower()
    if said == yes.strip().lower():
        return 2, completion.logprob
    return (1 if said == no.strip().lower() else 0), -completion.logprob


def _measured(name: str, order: Sequence[int], grades: Mapping[int, int], least: int, suffix: str) -> Stat:
    kind, _, cut = name.partition(".")
    if kind not in _NAMES:
        raise UsageError(
            f"There is no ranking measure {name!r}. Known: {', '.join(_NAMES)}, with .k after it."
        )
    k = int(cut) if cut else None
    value = ranking_measure(kind, order, grades, k, least=least)
    return stat(_NAMES[kind] + (f"@{k}" if k else "") + suffix, value)


def ranking_measure(
    kind: str, order: Sequence[int], grades: Mapping[int, int], k: int | None, *, least: int = 1
) -> float:
    """A measure of an order; `grades` says how relevant a passage is, none meaning not.

    Below `least` a grade counts as none, but for NDCG, which weighs grades as they are.
    """
    relevant = {at for at, grade in grades.items() if grade >= least}
    shown = order[:k]
    if kind == "recip_rank":
        return next((1.0 / place for place, at in enumerate(shown, start=1) if at in relevant), 0.0)
    if kind == "success":
        return float(any(at in relevant for at in shown))
    if kind == "recall":
        return sum(at in relevant for at in shown) / len(relevant) if relevant else 0.0
    best = _gain(sorted(grades.values(), reverse=True)[:k])
    return _gain([grades.get(at, 0) for at in shown]) / best if best else 0.0


def _gain(grades: Sequence[int]) -> float:
    return sum(grade / math.log2(place + 1) for place, grade in enumerate(grades, start=1))
