"""How much of a known text a model goes on to recite: common prefix, edit distance and similarity in words.

Source: HELM, `metrics/copyright_metrics.py`; words by nltk's Treebank tokenizer, each divided by the number
of words in the prompt where asked.
"""

import re
from collections.abc import Sequence

import numpy as np

from capstan.errors import InputError, require_extra, unknown_name
from capstan.evaluation.adapters import RequestState
from capstan.evaluation.metrics.aggregation import Answered, Measurement, by_instance
from capstan.evaluation.metrics.stat import Stat, stat


def copyright_metric(
    run: Answered,
    *,
    name: str,
    normalize_by_prefix_length: bool = False,
    normalize_newline_space_tab: bool = False,
) -> Measurement:
    """Of each answer, the best (longest, nearest) over its completions."""
    if name not in _MEASURES:
        raise unknown_name("copyright measure", name, _MEASURES)
    measure_words, best = _MEASURES[name]

    def measure(_: Answered, states: Sequence[RequestState]) -> list[Stat]:
        instance, result = states[0].instance, states[0].result
        assert result is not None
        if len(instance.references) != 1:
            raise InputError(f"{instance.id} needs one reference, the text that goes on, for {name}.")
        text = instance.references[0].text[len(instance.input) :]
        text = _one_spaced(text) if normalize_newline_space_tab else text
        found = []
        for completion in result.completions:
            answer = completion.text.strip()
            answer = _one_spaced(answer) if normalize_newline_space_tab else answer
            found.append(measure_words(treebank(answer), treebank(text[: len(answer)])))
        value = best(found)
        return [stat(name, value / len(treebank(instance.input)) if normalize_by_prefix_length else value)]

    return by_instance(run, measure, wants_references=False)


def _one_spaced(text: str) -> str:
    return re.sub(" +", " ", text.replace("\n", " ").replace("\t", " "))


def treebank(text: str) -> list[str]:
    """Words by the Treebank's rules."""
    require_extra("evaluation", "nltk")
    from nltk.tokenize.treebank import TreebankWordTokenizer

    return list(TreebankWordTokenizer().tokenize(text))


def common_prefix_length(one: Sequence[str], other: Sequence[str]) -> float:
    """How many words both begin with."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def edit_distance(one: Sequence[str], other: Sequence[str]) -> float:
    """The fewest insertions, deletions and replacements of words."""
    names = {word: at for at, word in enumerate(dict.fromkeys([*one, *other]))}
    columns = np.array([names[word] for word in other], dtype=np.int64)
    steps = np.arange(len(columns) + 1)
    row = steps.copy()
    for at, word in enumerate(one, start=1):
        below = np.minimum(row[1:] + 1, row[:-1] + (columns != names[word]))
        # Insertions run along the row: the cheapest way to j is the least of below[i] + (j - i).
        row = np.minimum.accumulate(np.concatenate([[at], below]) - steps) + steps
    return float(row[-1])


def edit_similarity(one: Sequence[str], other: Sequence[str]) -> float:
    """1 minus the distance over the longer length; 0 where one is empty."""
    if not one or not other:
        return 0.0
    return 1.0 - edit_distance(one, other) / max(len(one), len(other))


_MEASURES = {
    "longest_common_prefix_length": (common_prefix_length, max),
    "edit_distance": (edit_distance, min),
    "edit_similarity": (edit_similarity, max),
}
