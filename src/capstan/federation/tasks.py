"""What a server asks of a device, and what comes back: all tensors are packets. NumPy only."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol, TypeVar

T = TypeVar("T")


class Work(IntEnum):
    """What a device is to do, and the packets of task and result; [weights] only where they are newer."""

    FORWARD = 1  # [weights] -> activations and, unless U-shaped, labels
    HEAD = 2  # features -> their gradient, and the loss
    BACKWARD = 3  # the gradient of the activations -> nothing
    LOCAL = 4  # [weights] -> the loss
    WEIGHTS = 5  # -> weights


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """One thing to do, with the samples from `start` to `stop` of the epoch's order.

    `shape` is that of one sample's features, for a head.
    """

    work: Work
    epoch: int
    iteration: int
    start: int = 0
    stop: int = 0
    shape: tuple[int, ...] = ()
    packets: tuple[bytes, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What came of a task; `loss` is the mean over its samples, where the device has it."""

    packets: tuple[bytes, ...] = ()
    loss: float = 0.0


class DeviceFacts(NamedTuple):
    """What a server knows of a device: never a sample."""

    num_samples: int
    batch_size: int
    cut_shape: tuple[int, ...]  # of one sample's activations
    is_shared: bool = True  # its part of the network is averaged


class Fleet(Protocol):
    """All devices, wherever they are."""

    @property
    def facts(self) -> Sequence[DeviceFacts]:
        """Of each device by number."""

    def present(self, numbers: Sequence[int], least: int) -> set[int]:
        """Which of these can be asked, once `least` of them can."""

    def take_restarted(self) -> set[int]:
        """The devices that have begun anew since this was last asked: what they had, they have no more."""

    def run(self, tasks: Mapping[int, Task], read: Callable[[int, Result], T]) -> dict[int, T]:
        """What `read` made of each device's result; those that did not come in time are not there.

        A device whose result makes `read` raise `InputError` is refused.
        """
