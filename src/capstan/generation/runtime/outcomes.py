"""What logits come to: the next token, or the log-probability of a prompt's token.

Outcomes are found where the logits are and taken over by the sequences, here or on another rank, where they
arrive as a row of numbers whose length both sides know.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from capstan.generation.requests import TokenLogprob
from capstan.generation.runtime.block_schedule import Pick
from capstan.generation.runtime.sampling import choose, logprobs_of
from capstan.generation.runtime.sequences import Sequence as Growing


class Outcome(NamedTuple):
    """`token` and its log-probability; a prompt's own token has only the second that is new."""

    token: int | None = None
    logprob: TokenLogprob | None = None


def outcomes_of(
    picks: Sequence[Pick], logits: Tensor, waiting: Sequence[Growing], *, generates: bool
) -> list[Outcome]:
    """One for each row of `logits` (float32). Without `generates`, nothing follows a prompt's last token."""
    outcomes = [Outcome()] * len(picks)
    inside = [row for row, pick in enumerate(picks) if _is_inside(pick, waiting)]
    if inside:
        sequences = [waiting[picks[row].sequence] for row in inside]
        own = [each.prompt[picks[row].position + 1] for row, each in zip(inside, sequences, strict=True)]
        counts = [each.request.prompt_logprobs or 0 for each in sequences]
        for row, scored in zip(inside, logprobs_of(_rows(logits, inside), own, counts), strict=True):
            outcomes[row] = Outcome(None, scored)
    last = [row for row, pick in enumerate(picks) if not _is_inside(pick, waiting)] if generates else []
    if last:
        found = _continued(_rows(logits, last), [waiting[picks[row].sequence] for row in last])
        for row, outcome in zip(last, found, strict=True):
            outcomes[row] = outcome
    return outcomes


def _continued(logits: Tensor, sequences: Sequence[Growing]) -> list[Outcome]:
    tokens = choose(logits, [sequence.draw for sequence in sequences]).tolist()
    wanting = [row for row, sequence in enumerate(sequences) if sequence.request.logprobs is not None]
    scored: dict[int, TokenLogprob] = {}
    if wanting:
        counts = [sequences[row].request.logprobs or 0 for row in wanting]
        found = logprobs_of(logits[wanting], [tokens[row] for row in wanting], counts)
        scored = dict(zip(wanting, found, strict=True))
    return [Outcome(token, scored.get(row)) for row, token in enumerate(tokens)]


def _rows(logits: Tensor, rows: list[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[rows]


def _is_inside(pick: Pick, waiting: Sequence[Growing]) -> bool:
    """Whether what follows is a prompt's own token."""
    return pick.position < len(waiting[pick.sequence].prompt) - 1


def take_over(picks: Sequence[Pick], outcomes: Sequence[Outcome], waiting: Sequence[Growing]) -> list[int]:
    """Give outcomes to their sequences; returns which sequences are over."""
    ended = []
    for pick, (token, logprob) in zip(picks, outcomes, strict=True):
        sequence = waiting[pick.sequence]
        if _is_inside(pick, waiting):
            assert logprob is not None
            sequence.prompt_logprobs.append(logprob)
            continue
        if token is None:
            sequence.finish_reason = "length"
        else:
            if logprob is not None:
                sequence.logprobs.append(logprob)
            sequence.append(token)
        if sequence.finish_reason is not None:
            ended.append(pick.sequence)
    return ended


# --- on the way between ranks ----------------------------------------------------------------------------


class Form(NamedTuple):
    """What both sides know of outcomes: whether prompts are continued, and how many tokens there are."""

    generates: bool
    vocabulary: int


def num_values(picks: Sequence[Pick], waiting: Sequence[Growing], form: Form) -> int:
    """How many numbers `to_values` makes of these picks' outcomes."""
    return sum(
        has_token + (0 if count is None else 1 + 2 * count)
        for _, has_token, count in _parts(picks, waiting, form)
    )


def to_values(outcomes: Sequence[Outcome]) -> list[float]:
    """Tokens and log-probabilities as float64 numbers, which hold both exactly."""
    values: list[float] = []
    for token, logprob in outcomes:
        if token is not None:
            values.append(token)
        if logprob is not None:
            values += [logprob.logprob, *(number for pair in logprob.top for number in pair)]
    return values


def from_values(
    values: Sequence[float], picks: Sequence[Pick], waiting: Sequence[Growing], form: Form
) -> list[Outcome]:
    """The outcomes of which `to_values` made these numbers."""
    numbers, outcomes = iter(values), []
    for pick, has_token, count in _parts(picks, waiting, form):
        token = int(next(numbers)) if has_token else None
        logprob = None
        if count is not None:
            own = waiting[pick.sequence].prompt[pick.position + 1] if token is None else token
            value = next(numbers)
            top = tuple((int(next(numbers)), next(numbers)) for _ in range(count))
            logprob = TokenLogprob(token=own, logprob=value, top=top)
        outcomes.append(Outcome(token, logprob))
    return outcomes


def _parts(
    picks: Sequence[Pick], waiting: Sequence[Growing], form: Form
) -> Iterator[tuple[Pick, bool, int | None]]:
    """Each pick, whether its outcome has a token, and how many of the likeliest stand beside its
    log-probability, if that is wanted."""
    for pick in picks:
        request = waiting[pick.sequence].request
        if _is_inside(pick, waiting):
            yield pick, False, min(request.prompt_logprobs or 0, form.vocabulary)
        elif form.generates:
            wanted = request.logprobs
            yield pick, True, None if wanted is None else min(wanted, form.vocabulary)
        else:
            yield pick, False, None
