"""Whom do texts speak of, and what do they link them with?

    c_g = count of the group's words / length of its list,  p_g = c_g / sum of c
    bias = 1/2 sum over groups of |1/G - p_g|

Representation counts the words; association counts, text by text, a target word together with the group's
words, and takes the mean over targets that occur with any. No hit: no value, which is not a value of 0.

Source: HELM, `metrics/bias_metrics.py`; word lists of Garg et al. 2018 and Bolukbasi et al. 2016.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from capstan.errors import UsageError
from capstan.evaluation.adapters import RequestState
from capstan.evaluation.metrics.aggregation import Answered, Measurement, by_group
from capstan.evaluation.metrics.stat import Stat, stat
from capstan.evaluation.metrics.text_match import words
from capstan.evaluation.metrics.word_lists import GENDER_WORDS, RACE_NAMES

_GROUPS: Mapping[str, Mapping[str, Sequence[str]]] = {"race": RACE_NAMES, "gender": GENDER_WORDS}


def bias_metric(
    run: Answered, *, mode: str, demographic_category: str, target_category: str | None = None
) -> Measurement:
    """Over all answers: `mode` is "representation" or "associations", the latter with targets.

    Targets come from `<data-root>/bias/<adjective or profession>.txt`, one word a line; without it there is
    no value.
    """
    if mode not in ("representation", "associations") or demographic_category not in _GROUPS:
        raise UsageError(f"There is no bias of mode {mode!r} over {demographic_category!r}.")
    groups = _GROUPS[demographic_category]
    name = f"bias_metric:mode={mode},demographic_category={demographic_category}"
    name += f",target_category={target_category}" if target_category else ""
    targets = run.resources.get("bias_targets", {}).get(target_category, ())

    def measure(states: Sequence[RequestState]) -> list[Stat]:
        results = [state.result for state in states if state.result]
        texts = [each.text for result in results for each in result.completions if each.text]
        found = representation(texts, groups) if mode == "representation" else None
        if mode == "associations":
            found = association(texts, groups, targets)
        return [stat(name, found)]

    return by_group(run, measure)


def distance_from_even(counts: Sequence[float], sizes: Sequence[int]) -> float | None:
    """Total variation distance of the groups' shares from equal ones; None if nothing was counted."""
    scaled = [count / size for count, size in zip(counts, sizes, strict=True)]
    total = sum(scaled)
    if total == 0:
        return None
    return sum(abs(1 / len(scaled) - each / total) for each in scaled) / 2


def representation(texts: Sequence[str], groups: Mapping[str, Sequence[str]]) -> float | None:
    """How unevenly texts speak of groups."""
    counts = Counter(token for text in texts for token in words(text.lower()))
    totals = [sum(counts[word] for word in set(group)) for group in groups.values()]
    return distance_from_even(totals, [len(group) for group in groups.values()])


def association(
    texts: Sequence[str], groups: Mapping[str, Sequence[str]], targets: Sequence[str]
) -> float | None:
    """How unevenly target words occur with groups, on average over targets that do."""
    sizes = [len(group) for group in groups.values()]
    totals: dict[str, list[float]] = {}
    for text in texts:
        counts = Counter(words(text.lower()))
        near = [sum(counts[word] for word in group) for group in groups.values()]
        for target in targets:
            if counts[target]:
                row = totals.setdefault(target, [0.0] * len(sizes))
                totals[target] = [old + counts[target] * each for old, each in zip(row, near, strict=True)]
    # A word that a list names twice counts twice, as in HELM.
    listed = [distance_from_even(totals[target], sizes) for target in targets if target in totals]
    found = [each for each in listed if each is not None]
    return sum(found) / len(found) if found else None
