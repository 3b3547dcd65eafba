"""Summaries: ROUGE against the reference, and how much was copied from the text.

    coverage = share of the summary's words that lie in fragments of the text
    density = mean squared length of the fragment a word lies in
    compression = words of the text / words of the summary

Source: Grusky et al. 2018 (arXiv 1804.11283), section 4; HELM, `metrics/summarization_metrics.py`. Differs:
words are cut by nltk (HELM: spaCy); scores by other models (SummaC, BERTScore, QAFactEval) are left out.
"""

from collections.abc import Sequence

from capstan.evaluation.adapters import RequestState
from capstan.evaluation.metrics.aggregation import Answered, Measurement, by_instance
from capstan.evaluation.metrics.stat import Stat, stat
from capstan.evaluation.metrics.text_match import rouge, words

_ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


def summarization_metric(run: Answered, *, task: str = "", device: str = "cpu") -> Measurement:
    """`task` and `device` are HELM's, for its scores by other models."""
    return by_instance(run, _measure, wants_references=False)


def _measure(_: Answered, states: Sequence[RequestState]) -> list[Stat]:
    instance, result = states[0].instance, states[0].result
    assert result is not None
    answer = _unbraced(result.completions[0].text.strip())
    golds = [_unbraced(reference.text) for reference in instance.references]
    stats = [stat(name, max(rouge(kind)(gold, answer) for gold in golds)) for name, kind in _ROUGE.items()]
    coverage, density, compression = extractiveness(words(_unbraced(instance.input)), words(answer))
    return [
        *stats,
        stat("summarization_coverage", coverage),
        stat("summarization_density", density),
        stat("summarization_compression", compression),
    ]


def _unbraced(text: str) -> str:
    return text.removeprefix("{").removesuffix("}")


def extractiveness(text: Sequence[str], summary: Sequence[str]) -> tuple[float, float, float]:
    """Coverage, density and compression; all 0 of an empty summary."""
    if not summary:
        return 0.0, 0.0, 0.0
    lengths = fragment_lengths(text, summary)
    size = len(summary)
    return sum(lengths) / size, sum(each**2 for each in lengths) / size, len(text) / size


def fragment_lengths(text: Sequence[str], summary: Sequence[str]) -> list[int]:
    """Greedily, the longest stretches of the summary that stand in the text, case aside."""
    text, summary = [word.lower() for word in text], [word.lower() for word in summary]
    starts: dict[str, list[int]] = {}
    for at, word in enumerate(text):
        starts.setdefault(word, []).append(at)
    lengths, at = [], 0
    while at < len(summary):
        longest = max(
            (_same_from(text, begin, summary, at) for begin in starts.get(summary[at], ())), default=0
        )
        if longest:
            lengths.append(longest)
        at += max(1, longest)
    return lengths


def _same_from(text: Sequence[str], begin: int, summary: Sequence[str], at: int) -> int:
    count = 0
    while (
        begin + count < len(text) and at + count < len(summary) and text[begin + count] == summary[at + count]
    ):
        count += 1
    return count
