"""From logits to tokens.

Chance is a pure function of the request's seed (or else of its id) and the token's step, so an answer does
not depend on which batch or block computed it.

The order is that of vLLM: what must not come is ruled out, `logit_bias` is added, penalties are applied, then
the likeliest token is taken; or else logits are divided by the temperature, and min-p, top-k and top-p, in
this order, leave those among which one is drawn.
"""

from collections.abc import Mapping, Sequence
from math import inf, log
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from capstan.generation.requests import TokenLogprob
from capstan.generation.runtime.penalties import Penalties, penalise

_MASK = 2**64 - 1
# Temperatures that a float32 can divide by; a smaller one leaves the likeliest token only.
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 1e-30, 1e30
_NO_BIAS: Mapping[int, float] = MappingProxyType({})


class Draw(NamedTuple):
    """How one row of logits becomes a token: the request's settings, its seed, and the token's step.

    `banned` are tokens that must not come; `bias` is what is added to tokens' logits.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    step: int
    banned: frozenset[int] = frozenset()
    min_p: float = 0.0
    bias: Mapping[int, float] = _NO_BIAS
    penalties: Penalties | None = None


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) from a seed and an index, by the SplitMix64 mixer (Steele, Lea, Flood 2014)."""
    state = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xD1B54A32D192ED03) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((state ^ (state >> 31)) >> 11) / 2**53


def choose(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """A token for each row of logits `[rows, vocabulary]` (float32): `[rows]`."""
    logits = _adjusted(logits, draws)
    tokens = logits.argmax(dim=-1)
    sampled = [row for row, draw in enumerate(draws) if draw.temperature >= _LEAST_TEMPERATURE]
    if sampled:
        rows = torch.tensor(sampled, device=logits.device)
        tokens[rows] = _sample(logits[rows], [draws[row] for row in sampled])
    return tokens


def _adjusted(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The logits as requests want them before chance comes in; another tensor if that changes anything."""
    size = logits.shape[1]
    added = {
        row * size + token: value
        for row, draw in enumerate(draws)
        if draw.bias or draw.banned
        for token, value in {**draw.bias, **dict.fromkeys(draw.banned, -inf)}.items()
        if token < size
    }
    penalties = {row: draw.penalties for row, draw in enumerate(draws) if draw.penalties is not None}
    if not added and not penalties:
        return logits
    logits = logits.clone(memory_format=torch.contiguous_format)
    if added:
        _add(logits.view(-1), added)
    if penalties:
        penalise(logits, penalties)
    return logits


def _add(flat: Tensor, added: Mapping[int, float]) -> None:
    """Add to some places, in place."""
    places = torch.tensor(list(added), device=flat.device)
    flat[places] += torch.tensor(list(added.values()), device=flat.device)


def _sample(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Invert the cumulative distribution of the tokens that min-p, top-k, then top-p leave, at a uniform
    number."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    temperatures = column([min(draw.temperature, _MOST_TEMPERATURE) for draw in draws])
    ordered, order = (logits / temperatures).sort(dim=-1, descending=True)
    rank = torch.arange(ordered.shape[1], device=logits.device)
    beyond = rank >= column([draw.top_k or ordered.shape[1] for draw in draws])
    if any(draw.min_p for draw in draws):
        # p < min_p p_most, in logarithms
        beyond |= ordered < ordered[:, :1] + column(
            [log(draw.min_p) if draw.min_p else -inf for draw in draws]
        )
    probabilities = ordered.masked_fill_(beyond, -torch.inf).softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = ~beyond & (before < column([draw.top_p for draw in draws]))
    kept[:, 0] = True
    cumulative = probabilities.mul_(kept).cumsum(dim=-1)
    target = column([uniform(draw.seed, draw.step) for draw in draws]) * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True).clamp_(max=ordered.shape[1] - 1)
    place = torch.minimum(place, kept.sum(dim=-1, keepdim=True) - 1)
    return order.gather(1, place)[:, 0]


def logprobs_of(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    """The log-probability of `tokens[i]` in row i, with the `counts[i]` likeliest tokens beside it.

    Log-probabilities are the model's own: before bias, penalties, temperature and all that follows.
    """
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    most = max(counts)
    if most == 0:
        return [TokenLogprob(token=token, logprob=value) for token, value in zip(tokens, own, strict=True)]
    best = logprobs.topk(min(most, logprobs.shape[1]), dim=-1)
    tops = [
        list(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return [
        TokenLogprob(token=token, logprob=value, top=tuple(top[:count]))
        for token, value, top, count in zip(tokens, own, tops, counts, strict=True)
    ]
