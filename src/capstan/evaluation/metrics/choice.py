"""Multiple choice as lm-evaluation-harness scores it: sums of log-probabilities, plain and by bytes.

Source: lm-evaluation-harness 0.4, `api/task.py`: acc = argmax of sums, acc_norm = argmax of sums over the
length of the choice's text, acc_bytes likewise over its bytes.
"""

from collections.abc import Callable, Sequence

from capstan.evaluation.adapters import RequestState
from capstan.evaluation.metrics.aggregation import Answered, Measurement, by_instance
from capstan.evaluation.metrics.basic import reference_sums
from capstan.evaluation.metrics.stat import Stat, stat


def choice_metric(run: Answered) -> Measurement:
    """`acc`, `acc_norm` and `acc_bytes` of each question."""

    def measure(run: Answered, states: Sequence[RequestState]) -> list[Stat]:
        texts = [reference.text for reference in states[0].instance.references]
        right = {at for at, each in enumerate(states[0].instance.references) if each.is_correct}
        sums = reference_sums(run, states)
        by: dict[str, Callable[[str], int]] = {
            "acc": lambda _: 1,
            "acc_norm": len,
            "acc_bytes": lambda text: len(text.encode()),
        }
        return [
            stat(
                name,
                float(_best([total / size(text) for total, text in zip(sums, texts, strict=True)]) in right),
            )
            for name, size in by.items()
        ]

    return by_instance(run, measure, wants_references=True)


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda at: scores[at])
