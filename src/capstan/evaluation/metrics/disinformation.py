"""How varied several answers to one prompt are: self-BLEU and a Monte Carlo estimate of entropy in nats.

Source: HELM, `metrics/disinformation_metrics.py`, without its files of human judgements: these two scenarios
are prompts with automatic metrics only.
"""

from collections.abc import Sequence

from capstan.errors import require_extra, unknown_name
from capstan.evaluation.adapters import RequestState
from capstan.evaluation.metrics.aggregation import Answered, Measurement, by_instance
from capstan.evaluation.metrics.stat import Stat, stat
from capstan.evaluation.models import Completion


def variety_metric(run: Answered, *, name: str) -> Measurement:
    """`name` is "self_bleu" or "monte_carlo_entropy"."""
    measures = {"self_bleu": self_bleu, "monte_carlo_entropy": monte_carlo_entropy}
    if name not in measures:
        raise unknown_name("measure of variety", name, measures)

    def measure(_: Answered, states: Sequence[RequestState]) -> list[Stat]:
        assert states[0].result is not None
        return [stat(name, measures[name](states[0].result.completions))]

    return by_instance(run, measure, wants_references=False)


def self_bleu(completions: Sequence[Completion]) -> float:
    """The mean BLEU (0 to 100) of each answer against all others; 0 of fewer than two."""
    require_extra("evaluation", "sacrebleu")
    from sacrebleu.metrics.bleu import BLEU

    texts = [each.text.strip() for each in completions if each.text.strip()]
    if len(texts) <= 1:
        return 0.0
    bleu = BLEU(effective_order=True)
    scores = [
        bleu.sentence_score(hypothesis=text, references=texts[:at] + texts[at + 1 :]).score
        for at, text in enumerate(texts)
    ]
    return float(sum(scores) / len(scores))


def monte_carlo_entropy(completions: Sequence[Completion]) -> float | None:
    """Minus the mean log-probability of answers that have tokens; None without any."""
    known = [-each.logprob for each in completions if each.tokens]
    return sum(known) / len(known) if known else None
