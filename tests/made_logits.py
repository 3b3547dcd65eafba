"""What a request's parameters make of logits, written as the definitions are, in float64, token by token."""

from collections.abc import Sequence

import torch

from capstan.generation import Request


def adjusted(
    logits: Sequence[float], prompt: Sequence[int], generated: Sequence[int], request: Request
) -> list[float]:
    """The logits from which the next token is taken, before temperature.

    Source: OpenAI's `mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence`; CTRL's penalty;
    vLLM's order, which adds the bias first.
    """
    values = []
    for token, logit in enumerate(logits):
        value = logit + request.logit_bias.get(token, 0.0)
        if token in prompt or token in generated:
            penalty = request.repetition_penalty
            value = value / penalty if value > 0 else value * penalty
        count = list(generated).count(token)
        value -= count * request.frequency_penalty + float(count > 0) * request.presence_penalty
        values.append(value)
    return values


def left_by(logits: Sequence[float], request: Request) -> torch.Tensor:
    """The probabilities from which adjusted logits are drawn: temperature, min-p, top-k, top-p."""
    values = torch.tensor(logits, dtype=torch.float64) / request.temperature
    probabilities = values.softmax(0)
    values[probabilities < request.min_p * probabilities.max()] = -torch.inf
    ordered, order = values.sort(descending=True)
    ordered[request.top_k or len(ordered) :] = -torch.inf
    reached = ordered.softmax(0).cumsum(0) - ordered.softmax(0)
    ordered[reached >= request.top_p] = -torch.inf
    return torch.zeros_like(values).scatter(0, order, ordered.softmax(0))
