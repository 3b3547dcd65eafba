"""What the server has of its devices, and its messages with them, each counted as it crosses."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from capstan.errors import InputError
from capstan.federation.cut_line import CutReceiver, CutSender, read_labels, read_weights, write_weights
from capstan.federation.iterations import HeadAnswer
from capstan.federation.members import flat_state, num_state_elements, set_flat_state, weighted_mean
from capstan.federation.packets import sizes_of
from capstan.federation.schedule import Batch, Settings
from capstan.federation.tasks import Fleet, Result, Task, Work
from capstan.federation.traffic import DOWN, UP
from capstan.federation.wire import Wire
from capstan.transport.ledger import Ledger


class Arrived(NamedTuple):
    """A batch at the server: its activations (samples, width), and its labels unless they stay."""

    batch: Batch
    activations: Tensor
    labels: Tensor | None


@dataclass(eq=False)
class Member:
    """What the server keeps for one device."""

    cut: CutReceiver
    head: CutSender
    version: int = -1  # of the average that its weights are from; -1 before the first
    samples_since_average: int = 0


class Exchange:
    """The messages of one job, over whatever the fleet is reached by."""

    def __init__(
        self,
        fleet: Fleet,
        ledger: Ledger,
        wire: Wire,
        settings: Settings,
        num_classes: int,
        shared_parts: nn.ModuleList,
    ) -> None:
        self.fleet, self.ledger, self._shared_parts = fleet, ledger, shared_parts
        self._has_labels, self._num_classes = settings.algorithm != "u-shaped", num_classes
        self.version = 0  # of the average that `shared_parts` are
        self.members = [
            Member(CutReceiver(wire, number), CutSender(wire, number, settings.seed))
            for number in range(len(fleet.facts))
        ]

    def present(self, batches: Sequence[Batch], least: int) -> list[Batch]:
        """The batches of devices that can be asked; those that have begun anew get the current weights."""
        there = self.fleet.present([batch.device for batch in batches], least)
        for number in self.fleet.take_restarted():
            self.members[number].version, self.members[number].samples_since_average = -1, 0
        return [batch for batch in batches if batch.device in there]

    def forward(self, batches: Sequence[Batch], epoch: int, step: int) -> list[Arrived]:
        """Have devices send their batches, in the order of `batches`; some get newer weights first."""
        tasks = self._batch_tasks(Work.FORWARD, batches, epoch, step)

        def read(number: int, result: Result) -> tuple[Tensor, Tensor | None]:
            task = tasks[number]
            rows, width = task.stop - task.start, math.prod(self.fleet.facts[number].cut_shape)
            activations, *labels = _packets(result, 1 + self._has_labels)
            hidden = self.members[number].cut.receive(activations, step, rows=rows, width=width)
            told = read_labels(labels[0], self._num_classes, number, step, rows=rows) if labels else None
            self._count(UP, activations)
            for message in labels:
                self._count(UP, message, "labels")
            return hidden, told

        came = self.fleet.run(tasks, read)
        self._note_versions(came)
        return [Arrived(batch, *came[batch.device]) for batch in batches if batch.device in came]

    def heads(
        self,
        arrived: Sequence[Arrived],
        features: Sequence[Tensor],
        shape: tuple[int, ...],
        epoch: int,
        step: int,
    ) -> list[HeadAnswer | None]:
        """Give each device its features; what its head says of them."""
        tasks = {}
        for (batch, _, _), part in zip(arrived, features, strict=True):
            message = self.members[batch.device].head.send(part, step)
            self._count(DOWN, message)
            tasks[batch.device] = Task(
                work=Work.HEAD, epoch=epoch, iteration=step, shape=shape, packets=(message,)
            )

        def read(number: int, result: Result) -> HeadAnswer:
            (message,) = _packets(result, 1)
            gradient = self.members[number].head.gradient(message, step)
            if not math.isfinite(result.loss):
                raise InputError(f"A loss is a finite number, found {result.loss}: training has diverged.")
            self._count(UP, message)
            return HeadAnswer(result.loss, gradient)

        came = self.fleet.run(tasks, read)
        return [came.get(each.batch.device) for each in arrived]

    def backward(
        self, arrived: Sequence[Arrived], gradients: Sequence[Tensor], epoch: int, step: int
    ) -> None:
        """Give each device the gradient of what it sent; it makes a step."""
        tasks = {}
        for (batch, _, _), gradient in zip(arrived, gradients, strict=True):
            message = self.members[batch.device].cut.answer(gradient, step)
            self._count(DOWN, message)
            tasks[batch.device] = Task(work=Work.BACKWARD, epoch=epoch, iteration=step, packets=(message,))
        came = self.fleet.run(tasks, lambda number, result: _packets(result, 0))
        for batch, _, _ in arrived:
            if batch.device in came:
                self.members[batch.device].samples_since_average += len(batch.rows)

    def local(self, batches: Sequence[Batch], epoch: int, step: int) -> dict[int, float]:
        """Have devices make a step of the whole network: the loss of each."""
        tasks = self._batch_tasks(Work.LOCAL, batches, epoch, step)

        def read(_number: int, result: Result) -> float:
            _packets(result, 0)
            return result.loss

        came = self.fleet.run(tasks, read)
        self._note_versions(came)
        for batch in batches:
            if batch.device in came:
                self.members[batch.device].samples_since_average += len(batch.rows)
        return came

    def average(self, numbers: Sequence[int], epoch: int, step: int) -> None:
        """Average the device parts of those that have trained since the last time, by their samples."""
        size = num_state_elements(self._shared_parts)
        trained = [
            number
            for number in numbers
            if size and self.fleet.facts[number].is_shared and self.members[number].samples_since_average
        ]
        tasks = {number: Task(work=Work.WEIGHTS, epoch=epoch, iteration=step) for number in trained}

        def read(number: int, result: Result) -> Tensor:
            (message,) = _packets(result, 1)
            state = read_weights(message, size, number, step)
            self._count(UP, message, "weights")
            return state

        came = self.fleet.run(tasks, read)
        states = [
            (float(self.members[number].samples_since_average), came[number])
            for number in trained
            if number in came
        ]
        for number in numbers:
            self.members[number].samples_since_average = 0
        if states:
            set_flat_state(self._shared_parts, weighted_mean(states))
            self.version += 1

    def _batch_tasks(self, work: Work, batches: Sequence[Batch], epoch: int, step: int) -> dict[int, Task]:
        tasks, newest = {}, flat_state(self._shared_parts)
        for batch in batches:
            packets: tuple[bytes, ...] = ()
            is_current = self.members[batch.device].version == self.version
            if self.fleet.facts[batch.device].is_shared and len(newest) and not is_current:
                packets = (write_weights(newest, batch.device, step),)
                self._count(DOWN, packets[0], "weights")
            tasks[batch.device] = Task(
                work=work, epoch=epoch, iteration=step, start=batch.start, stop=batch.stop, packets=packets
            )
        return tasks

    def _note_versions(self, came: Iterable[int]) -> None:
        for number in came:
            self.members[number].version = self.version

    def _count(self, link: str, message: bytes, content: str = "values") -> None:
        sizes = sizes_of(message)
        self.ledger.count(link, content, sizes.values)
        self.ledger.count(link, "index", sizes.index)
        self.ledger.count(link, "framing", sizes.framing)


def _packets(result: Result, wanted: int) -> tuple[bytes, ...]:
    if len(result.packets) != wanted:
        raise InputError(f"Wanted {wanted} packets, found {len(result.packets)}.")
    return result.packets
