"""What members have: a device its samples, devices and server their parts of a network; and their state."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from capstan.errors import InputError, UsageError


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceData:
    """What lies on a device: (samples, …) inputs and (samples,) labels, and how many it takes at once.

    A device may have a bottom of its own that fits its means; its output must have as many elements as the
    others'. It is then trained by this device alone and never averaged.
    """

    inputs: Tensor
    labels: Tensor
    batch_size: int
    bottom: nn.Module | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.inputs, Tensor) and isinstance(self.labels, Tensor)):
            raise UsageError("A device's inputs and labels are tensors: use torch.from_numpy for arrays.")
        if len(self.inputs) != len(self.labels):
            raise InputError(f"{len(self.inputs)} inputs have {len(self.labels)} labels: one each is wanted.")
        if self.labels.is_floating_point():
            raise InputError(
                f"Labels are whole numbers from 0, found {self.labels.dtype}. Convert them first."
            )
        if self.batch_size < 1:
            raise UsageError(f"A batch has at least one sample, found {self.batch_size}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class CutNetwork:
    """A network in parts: `bottom` on devices, `top` on the server, and for the U-shape `head` on devices.

    The top gets what the bottom gives, in its shape. The parts are copied, never changed.
    """

    bottom: nn.Module
    top: nn.Module
    num_classes: int
    head: nn.Module | None = None

    @cached_property
    def num_parameters(self) -> int:
        """Elements of all parts' floating-point state."""
        parts = [self.bottom, self.top, *([self.head] if self.head is not None else [])]
        return sum(num_state_elements(part) for part in parts)


def floating_state(module: nn.Module) -> list[Tensor]:
    """Parameters and floating-point buffers, which averages are made of. Counters are not among them."""
    return [each for each in module.state_dict().values() if each.is_floating_point()]


def num_state_elements(module: nn.Module) -> int:
    """How many elements `flat_state` has."""
    return sum(each.numel() for each in floating_state(module))


def flat_state(module: nn.Module) -> Tensor:
    """All floating-point state as one flat tensor."""
    parts = [each.reshape(-1) for each in floating_state(module)]
    return torch.cat(parts) if parts else torch.empty(0)


@torch.no_grad()
def set_flat_state(module: nn.Module, flat: Tensor) -> None:
    """The inverse of `flat_state`; the module's tensors stay where they are."""
    at = 0
    for each in floating_state(module):
        each.copy_(flat[at : at + each.numel()].view_as(each))
        at += each.numel()


def weighted_mean(states: Iterable[tuple[float, Tensor]]) -> Tensor:
    """sum w_i s_i / sum w_i, summed in float64 in the order given."""
    pairs = list(states)
    total = sum(weight for weight, _ in pairs)
    mean = torch.zeros_like(pairs[0][1], dtype=torch.float64)
    for weight, state in pairs:
        mean += state.double() * (weight / total)
    return mean.to(pairs[0][1])


def sgd(modules: Iterable[nn.Module], learning_rate: float, momentum: float) -> torch.optim.Optimizer | None:
    """SGD over all parameters of `modules`, or None where there are none to train."""
    parameters = [each for module in modules for each in module.parameters() if each.requires_grad]
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=momentum) if parameters else None
