"""A device at work: its samples and its part of the network; it does tasks, one after the other."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from capstan.errors import InputError
from capstan.federation.cut_line import CutReceiver, CutSender, read_weights, write_labels, write_weights
from capstan.federation.members import DeviceData, flat_state, num_state_elements, set_flat_state, sgd
from capstan.federation.schedule import Settings, sample_order
from capstan.federation.tasks import DeviceFacts, Result, Task, Work
from capstan.federation.wire import Wire

Loss = Callable[[Tensor, Tensor], Tensor]
T = TypeVar("T")
_FRESH_OPTIMISERS = ("fedavg", "split", "splitfed-v1", "splitfed-v2")


class Device:
    """Device `number`, with its own copy of the device part and that part's optimiser."""

    def __init__(
        self,
        number: int,
        data: DeviceData,
        parts: Sequence[nn.Module],
        *,
        num_classes: int,
        wire: Wire,
        settings: Settings,
        loss: Loss = nn.functional.cross_entropy,
    ) -> None:
        self.number, self.data, self.loss = number, data, loss
        own = parts if data.bottom is None else [data.bottom, *parts[1:]]
        self.parts = nn.ModuleList(deepcopy(list(own)))
        self.optimiser: torch.optim.Optimizer | None = None
        self.cut, self.head = CutSender(wire, number, settings.seed), CutReceiver(wire, number)
        self._settings, self._num_classes, self._epoch = settings, num_classes, -1
        self._activations, self._labels = torch.empty(0), torch.empty(0, dtype=torch.int64)

    @property
    def facts(self) -> DeviceFacts:
        """What the server may know.

        Raises:
            InputError: the bottom does not go with the samples.
        """
        size, shape = len(self.data.labels), tuple(self.data.inputs.shape[1:])
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                hidden = deepcopy(self.parts[0]).eval()(
                    self.data.inputs[:1] if size else torch.zeros(1, *shape)
                )
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(
                f"The network does not go with samples of the shape {shape} and type "
                f"{self.data.inputs.dtype}: {error}"
            ) from error
        return DeviceFacts(size, self.data.batch_size, tuple(hidden.shape[1:]), self.data.bottom is None)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and labels of some of its samples."""
        return self.data.inputs[rows], self.data.labels[rows].long()

    def work(self, task: Task) -> Result:
        """Do a task. What is random in it depends on seed, device, epoch and iteration alone.

        Raises:
            InputError: a packet is not for this task, or the network cannot be trained on the batch.
        """
        does = {
            Work.FORWARD: self._forward,
            Work.HEAD: self._head,
            Work.BACKWARD: self._backward,
            Work.LOCAL: self._local,
            Work.WEIGHTS: self._weights,
        }
        seeds = [self._settings.seed, 8, self.number, task.epoch, task.iteration, task.work]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
            try:
                return does[task.work](task)
            except ValueError as error:  # such as batch normalisation's, of a single value
                raise InputError(
                    f"Device {self.number} cannot train on a batch of {task.stop - task.start} samples: "
                    f"{error}. Take larger batches, or layers that do not normalise over a batch."
                ) from error

    def _begin(self, task: Task) -> tuple[Tensor, Tensor]:
        """Take weights that are newer; the batch."""
        if task.packets:
            size = num_state_elements(self.parts)
            state = read_weights(task.packets[0], size, self.number, task.iteration)
            set_flat_state(self.parts, state)
        if task.epoch != self._epoch and self._settings.algorithm in _FRESH_OPTIMISERS:
            self.optimiser = None
        self._epoch = task.epoch
        if self.optimiser is None:
            self.optimiser = sgd(self.parts, self._settings.learning_rate, self._settings.momentum)
        order = sample_order(self._settings, task.epoch, self.number, len(self.data.labels))
        return self.batch(torch.from_numpy(order[task.start : task.stop]))

    def _forward(self, task: Task) -> Result:
        inputs, self._labels = self._begin(task)
        self._activations = self.parts[0](inputs)
        packets = [self.cut.send(self._activations.flatten(1), task.iteration)]
        if self._settings.algorithm != "u-shaped":
            packets.append(write_labels(self._labels, self._num_classes, self.number, task.iteration))
        self._zero()
        return Result(packets=tuple(packets))

    def _head(self, task: Task) -> Result:
        rows = len(self._labels)
        width = math.prod(task.shape)
        received = self.head.receive(task.packets[0], task.iteration, rows=rows, width=width)
        features = received.to(self._activations).requires_grad_()
        own_loss = self.loss(self.parts[1](features.view(rows, *task.shape)), self._labels)
        own_loss.backward()
        gradient = torch.zeros_like(features) if features.grad is None else features.grad
        return Result(packets=(self.head.answer(gradient, task.iteration),), loss=float(own_loss.detach()))

    def _backward(self, task: Task) -> Result:
        if self._activations.requires_grad:
            gradient = self.cut.gradient(task.packets[0], task.iteration).to(self._activations)
            self._activations.backward(gradient.view_as(self._activations))
        if self.optimiser is not None:
            self.optimiser.step()
        return Result()

    def _local(self, task: Task) -> Result:
        outputs, labels = self._begin(task)
        for part in self.parts:
            outputs = part(outputs)
        own_loss = self.loss(outputs, labels)
        self._zero()
        own_loss.backward()
        if self.optimiser is not None:
            self.optimiser.step()
        return Result(loss=float(own_loss.detach()))

    def _weights(self, task: Task) -> Result:
        return Result(packets=(write_weights(flat_state(self.parts), self.number, task.iteration),))

    def _zero(self) -> None:
        if self.optimiser is not None:
            self.optimiser.zero_grad()


class LocalFleet:
    """Devices in this process: all are there, each works when it is asked."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self.devices = list(devices)
        self.facts = [device.facts for device in devices]

    def present(self, numbers: Sequence[int], least: int) -> set[int]:
        """All of them."""
        return set(numbers)

    def take_restarted(self) -> set[int]:
        """None ever is."""
        return set()

    def run(self, tasks: Mapping[int, Task], read: Callable[[int, Result], T]) -> dict[int, T]:
        """See `Fleet`."""
        return {number: read(number, self.devices[number].work(task)) for number, task in tasks.items()}
