"""Multiple choice as lm-evaluation-harness scores it: sums of log-probabilities, plain and by bytes.

Source: lm-evaluation-harness 0.4, `api/task.py`: acc = argmax of sums, acc_norm = argmax of sums over the
length of the choice's text, acc_bytes likewise over its bytes.
"""

from collections.abc import Callable, Sequence

from capstan.evaluation.adapters import RequestState
from capstan.evaluation.metrics.aggregation import Answered, Measurement, by_instance
from capstan.evaluation.metrics.stat import Stat, stat
from capstan.evaluation.models import num_tokens_after


def choice_metric(run: Answered) -> Measurement:
    """`acc`, `acc_norm` and `acc_bytes` of each question."""

    def measure(run: Answered, states: Sequence[RequestState]) -> list[Stat]:
        texts = [reference.text for reference in states[0].instance.references]
        right = {at for at, each in enumerate(states[0].instance.references) if each.is_correct}
        sums = [_sum(run, state) for state in states]
        by: dict[str, Callable[[str], int]] = {
            "acc": lambda _: 1,
            "acc_norm": lambda text: max(1, len(text)),
            "acc_bytes": lambda text: max(1, len(text.encode())),
        }
        return [
            stat(
                name,
                float(_best([total / size(text) for total, text in zip(sums, texts, strict=True)]) in right),
            )
            for name, size in by.items()
        ]

    return by_instance(run, measure, wants_references=True)


def _sum(run: Answered, state: RequestState) -> float:
    """The log-probability of a choice after its context."""
    assert state.result is not None
    request = state.request
    context = request.prompt.removesuffix(request.continuation)
    tokens = state.result.completions[0].tokens
    count = num_tokens_after(run.model.encode, context, request.continuation)
    return sum(token.logprob for token in tokens[max(0, len(tokens) - count) :])


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda at: scores[at])
