"""One iteration over the cut, in process: batches up, the server's part as one, gradients down.

With labels at the server its loss is the mean over all samples that arrived. Device i, with n_i of n samples,
gets its gradient times n / n_i, so that each follows the mean of its own loss, and the mean of devices
weighted by n_i is a step of synchronous SGD on the uncut network. In the U-shape a device's head has that
loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from capstan.federation.cut_line import CutLine
from capstan.federation.members import Device

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardPass:
    """A device's batch under way: its activations with their graph, and what the server has of them."""

    device: Device
    activations: Tensor
    received: Tensor
    labels: Tensor  # at the server, or on the device in the U-shape
    line: CutLine
    head_line: CutLine | None = None

    @property
    def num_samples(self) -> int:
        return len(self.labels)


def server_step(
    passes: Sequence[ForwardPass],
    top: nn.Module,
    optimiser: torch.optim.Optimizer | None,
    loss: Loss,
    step: int,
) -> float:
    """Train `top` on all passes as one batch, and each device on its gradient; the mean loss."""
    pooled, sizes = _pooled(passes)
    mean_loss = loss(top(_shaped(pooled, passes)), torch.cat([each.labels for each in passes]))
    if optimiser is not None:
        optimiser.zero_grad()
    mean_loss.backward()
    if optimiser is not None:
        optimiser.step()
    for each, gradient in zip(passes, _gradient(pooled).split(sizes), strict=True):
        _zero(each.device)
        _finish(each, gradient * (len(pooled) / each.num_samples), step)
    return float(mean_loss.detach())


def u_shaped_step(
    passes: Sequence[ForwardPass],
    middle: nn.Module,
    optimiser: torch.optim.Optimizer | None,
    loss: Loss,
    step: int,
) -> float:
    """As `server_step`, but the network ends on the devices, with their labels."""
    pooled, sizes = _pooled(passes)
    features = middle(_shaped(pooled, passes))
    flat = features.flatten(1)
    gradients, mean_loss = [], 0.0
    for each, sent in zip(passes, flat.split(sizes), strict=True):
        assert each.head_line is not None
        _zero(each.device)
        got = each.head_line.forward(sent, step).requires_grad_()
        own_loss = loss(each.device.parts[1](got.view(-1, *features.shape[1:])), each.labels)
        own_loss.backward()
        share = each.num_samples / len(pooled)
        gradients.append(each.head_line.backward(_gradient(got), step) * share)
        mean_loss += float(own_loss.detach()) * share
    if optimiser is not None:
        optimiser.zero_grad()
    flat.backward(torch.cat(gradients))
    if optimiser is not None:
        optimiser.step()
    for each, gradient in zip(passes, _gradient(pooled).split(sizes), strict=True):
        _finish(each, gradient * (len(pooled) / each.num_samples), step)
    return mean_loss


def local_step(device: Device, inputs: Tensor, labels: Tensor, loss: Loss) -> float:
    """A step of the whole network on a device: federated averaging's."""
    outputs = inputs
    for part in device.parts:
        outputs = part(outputs)
    own_loss = loss(outputs, labels)
    _zero(device)
    own_loss.backward()
    if device.optimiser is not None:
        device.optimiser.step()
    return float(own_loss.detach())


def _pooled(passes: Sequence[ForwardPass]) -> tuple[Tensor, list[int]]:
    pooled = torch.cat([each.received for each in passes]).requires_grad_()
    return pooled, [each.num_samples for each in passes]


def _shaped(pooled: Tensor, passes: Sequence[ForwardPass]) -> Tensor:
    return pooled.view(-1, *passes[0].activations.shape[1:])


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _zero(device: Device) -> None:
    if device.optimiser is not None:
        device.optimiser.zero_grad()


def _finish(each: ForwardPass, gradient: Tensor, step: int) -> None:
    received = each.line.backward(gradient, step)
    if each.activations.requires_grad:
        each.activations.backward(received.view_as(each.activations))
    if each.device.optimiser is not None:
        each.device.optimiser.step()
