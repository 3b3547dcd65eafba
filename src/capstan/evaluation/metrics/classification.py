"""F1 over classes: of a whole set of answers, not of each.

Source: HELM, `metrics/classification_metrics.py`; macro averages over classes, micro over decisions. An
answer that is no known class is a "no" to every class.
"""

from collections.abc import Sequence

from capstan.evaluation.adapters import RequestState
from capstan.evaluation.metrics.aggregation import Answered, Measurement, by_group
from capstan.evaluation.metrics.stat import Stat, stat
from capstan.evaluation.metrics.text_match import normalised


def classification_metric(
    run: Answered, *, labels: Sequence[str] | None = None, delimiter: str | None = None
) -> Measurement:
    """`labels` are the classes; without them, the right answers seen. `delimiter` parts several labels."""

    def measure(states: Sequence[RequestState]) -> list[Stat]:
        wanted = [_wanted(state) for state in states]
        given = [_given(state, delimiter) for state in states]
        known = {_label(each) for each in labels} if labels else {each for row in wanted for each in row}
        macro, micro = f1_over_classes(wanted, given, sorted(known))
        return [stat("classification_macro_f1", macro), stat("classification_micro_f1", micro)]

    return by_group(run, measure)


def _label(text: str) -> str:
    return normalised(text, drops_articles=False)


def _wanted(state: RequestState) -> set[str]:
    return {_label(each.text) for each in state.instance.all_correct if each.text}


def _given(state: RequestState, delimiter: str | None) -> set[str]:
    assert state.result is not None
    text = state.result.completions[0].text
    parts = text.split(delimiter) if delimiter else [text]
    return {_label(part) for part in parts if part}


def f1_over_classes(
    wanted: Sequence[set[str]], given: Sequence[set[str]], classes: Sequence[str]
) -> tuple[float, float]:
    """Macro and micro F1; a class that is neither wanted nor given counts 0.

    Of a single class scikit-learn, which HELM asks, makes two: having it and not.
    """
    if len(classes) == 1:
        only = classes[0]
        wanted = [{"has" if only in each else "lacks"} for each in wanted]
        given = [{"has" if only in each else "lacks"} for each in given]
        classes = sorted({name for each in (*wanted, *given) for name in each})
    hits = [sum(each in w and each in g for w, g in zip(wanted, given, strict=True)) for each in classes]
    sizes = [sum(each in w for w in wanted) + sum(each in g for g in given) for each in classes]
    each_f1 = [2 * hit / size if size else 0.0 for hit, size in zip(hits, sizes, strict=True)]
    macro = sum(each_f1) / len(each_f1) if each_f1 else 0.0
    return macro, 2 * sum(hits) / sum(sizes) if sum(sizes) else 0.0
