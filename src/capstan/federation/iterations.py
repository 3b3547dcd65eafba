"""The server's part of an iteration: batches that arrived as one, through its layers and back.

With labels at the server its loss is the mean over all samples that arrived. Device i, with n_i of n samples,
gets its gradient times n / n_i, so that each follows the mean of its own loss, and the mean of devices
weighted by n_i is a step of synchronous SGD on the uncut network. In the U-shape a device's head has that
loss.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from capstan.federation.device import Loss
from capstan.federation.members import floating_state

Optimiser = torch.optim.Optimizer | None


class Outcome(NamedTuple):
    """The mean loss of an iteration, and the gradient of what each device sent."""

    loss: float
    gradients: list[Tensor]


class HeadAnswer(NamedTuple):
    """What a device's head says of its features: its mean loss and that loss's gradient."""

    loss: float
    gradient: Tensor


def server_step(
    received: Sequence[Tensor],
    labels: Sequence[Tensor],
    shape: tuple[int, ...],
    top: nn.Module,
    optimiser: Optimiser,
    loss: Loss,
) -> Outcome:
    """Train `top` on all batches, (samples, width) activations of `shape` a sample, as one."""
    pooled = _pooled(received, top)
    mean_loss = loss(top(pooled.view(-1, *shape)), torch.cat(list(labels)).to(pooled.device))
    if optimiser is not None:
        optimiser.zero_grad()
    mean_loss.backward()
    if optimiser is not None:
        optimiser.step()
    return Outcome(float(mean_loss.detach()), _own_gradients(pooled, [len(each) for each in received]))


def u_shaped_step(
    received: Sequence[Tensor],
    shape: tuple[int, ...],
    middle: nn.Module,
    optimiser: Optimiser,
    ask_heads: Callable[[Sequence[Tensor], tuple[int, ...]], Sequence[HeadAnswer | None] | None],
) -> Outcome | None:
    """As `server_step`, but the network ends on the devices, with their labels.

    `ask_heads` gives each device's features (samples, width), of a shape a sample, to its head; None stands
    for a device that did not answer, whose features get no gradient, and None altogether ends the step.
    """
    pooled = _pooled(received, middle)
    features = middle(pooled.view(-1, *shape))
    flat, sizes = features.flatten(1), [len(each) for each in received]
    answers = ask_heads(flat.split(sizes), tuple(features.shape[1:]))
    if answers is None:
        return None
    answered = sum(size for size, answer in zip(sizes, answers, strict=True) if answer is not None)
    gradients, mean_loss = [], 0.0
    for part, size, answer in zip(flat.split(sizes), sizes, answers, strict=True):
        if answer is None:
            gradients.append(torch.zeros_like(part))
            continue
        gradients.append(answer.gradient.to(flat) * (size / answered))
        mean_loss += answer.loss * (size / answered)
    if optimiser is not None:
        optimiser.zero_grad()
    flat.backward(torch.cat(gradients))
    if optimiser is not None:
        optimiser.step()
    return Outcome(mean_loss, _own_gradients(pooled, sizes, answered))


def like(module: nn.Module) -> Tensor:
    """An empty tensor of the type, and in the place, that a module's weights have."""
    return next((each.new_empty(0) for each in floating_state(module)), torch.empty(0))


def _pooled(received: Sequence[Tensor], module: nn.Module) -> Tensor:
    return torch.cat(list(received)).to(like(module)).requires_grad_()


def _own_gradients(pooled: Tensor, sizes: Sequence[int], total: int | None = None) -> list[Tensor]:
    gradient = torch.zeros_like(pooled) if pooled.grad is None else pooled.grad
    total = len(pooled) if total is None else total
    return [each * (total / size) for each, size in zip(gradient.split(list(sizes)), sizes, strict=True)]
