"""A network cut between devices and a server, trained in one process: what crosses is written and read."""

import math
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capstan.errors import InputError, UsageError
from capstan.federation.cut_line import masked
from capstan.federation.device import Device, LocalFleet, Loss
from capstan.federation.exchange import Arrived, Exchange
from capstan.federation.iterations import HeadAnswer, Outcome, like, server_step, u_shaped_step
from capstan.federation.members import (
    CutNetwork,
    DeviceData,
    flat_state,
    num_state_elements,
    set_flat_state,
    sgd,
    weighted_mean,
)
from capstan.federation.planner import Forecast, JobSizes, forecast
from capstan.federation.schedule import Iteration, Settings, epoch_iterations, is_lost
from capstan.federation.tasks import Fleet
from capstan.federation.traffic import DeviceLink
from capstan.federation.wire import Wire
from capstan.transport.ledger import Ledger

_JUDGED_AT_ONCE = 256


@dataclass(kw_only=True)
class EpochCounts:
    """What an epoch came to."""

    epoch: int
    loss: float | None = 0.0  # the mean over samples; None where there were none
    samples: int = 0
    iterations: int = 0
    lost_batches: int = 0
    skipped_iterations: int = 0
    seconds: float = 0.0


class SplitJob:
    """Devices and a server that train a cut network; see `Settings` for the algorithms.

    The optimiser is SGD with momentum everywhere. Where weights are averaged each epoch, devices (and the
    copies of the top of `splitfed-v1`) begin every epoch without momentum, both halves alike; else each keeps
    its own.

        job = SplitJob(network=CutNetwork(bottom=…, top=…, num_classes=10), devices=[DeviceData(…), …])
        job.run_epoch()
        job.accuracy(inputs, labels), job.ledger.traffic

    Raises:
        UsageError: an algorithm cannot do what is asked.
        InputError: bottoms differ in the width of the cut, or labels are not classes.
    """

    def __init__(
        self,
        *,
        network: CutNetwork,
        devices: Sequence[DeviceData] = (),
        fleet: Fleet | None = None,
        wire: Wire | None = None,
        settings: Settings | None = None,
        loss: Loss = nn.functional.cross_entropy,
    ) -> None:
        self.wire, self.settings, self.loss = wire or Wire(), settings or Settings(), loss
        self.network, self.ledger, self.epoch = network, Ledger(), 0
        on_device, self.top = divide(network, self.settings.algorithm)
        self.shared_parts = deepcopy(on_device)
        """The device part as last averaged, which the server has."""
        if fleet is None:
            _check_devices(network, devices, self.settings.algorithm)
            fleet = LocalFleet([self._device(number, data) for number, data in enumerate(devices)])
        self.devices: list[Device] = fleet.devices if isinstance(fleet, LocalFleet) else []
        """Those that are in this process."""
        self.exchange = Exchange(
            fleet, self.ledger, self.wire, self.settings, network.num_classes, self.shared_parts
        )
        self.top_optimiser = self._sgd(self.top)
        self._tops: dict[int, tuple[nn.Module, torch.optim.Optimizer | None]] = {}
        self.sizes = self._find_sizes()

    def forecast(self, epochs: int, link: DeviceLink | None = None) -> Forecast:
        """What the next `epochs` will send; without losses, and in codes of known size, exactly."""
        version, members = self.exchange.version, self.exchange.members
        fresh = {number: member.version == version for number, member in enumerate(members)}
        following = range(self.epoch, self.epoch + epochs)
        return forecast(self.sizes, self.wire, self.settings, following, link or DeviceLink(), fresh)

    def run_epoch(self, on_iteration: Callable[[Iteration], None] | None = None) -> EpochCounts:
        """Train for one epoch: every sample of the devices that take part once."""
        started = time.perf_counter()
        counts, loss_sum = EpochCounts(epoch=self.epoch), 0.0
        iterations = epoch_iterations(
            self.sizes.num_samples, self.sizes.batch_sizes, self.settings, self.epoch
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed * 1_000_003 + self.epoch)
            self._begin_epoch()
            for number, iteration in enumerate(iterations):
                loss_sum += self.train_iteration(iteration, number, counts)
                if on_iteration is not None:
                    on_iteration(iteration)
            self._end_epoch()
        self.epoch += 1
        counts.loss = loss_sum / counts.samples if counts.samples else None
        counts.seconds = time.perf_counter() - started
        return counts

    def train_iteration(self, iteration: Iteration, number: int, counts: EpochCounts) -> float:
        """Train on the batches of the epoch's iteration `number`, average who is due, add to `counts`.

        Gives the sum of the losses of the samples that arrived.
        """
        try:
            loss_sum = self._iterate(iteration, number, counts)
        except ValueError as error:  # such as batch normalisation's, of a single value
            sizes = ", ".join(str(len(batch.rows)) for batch in iteration.batches)
            raise InputError(
                f"The network cannot be trained on batches of {sizes} samples: {error}. Take larger batches, "
                "or layers that do not normalise over a batch."
            ) from error
        if iteration.averaged:
            self.exchange.average(iteration.averaged, self.epoch, number)
        return loss_sum

    @torch.no_grad()
    def outputs(self, inputs: Tensor, device: int | None = None) -> Tensor:
        """The network's outputs with what is sent masked and rounded as in training, 256 samples at a time.

        `device` names one with a bottom of its own; else it is the average of those that share theirs.
        """
        if device is None and not any(each.is_shared for each in self.exchange.fleet.facts):
            raise UsageError("Every device has a bottom of its own: say which device's is meant.")
        parts = self.shared_parts if device is None else self.devices[device].parts
        for part in (*parts, self.top):
            part.eval()
        try:
            return torch.cat([self._judge(parts, piece) for piece in inputs.split(_JUDGED_AT_ONCE)])
        finally:
            for part in (*parts, self.top):
                part.train()

    def _judge(self, parts: nn.ModuleList, inputs: Tensor) -> Tensor:
        hidden: Tensor = parts[0](inputs)
        if self.settings.algorithm == "fedavg":
            for part in parts[1:]:
                hidden = part(hidden)
            return hidden
        hidden = self.top(masked(self.wire, hidden.flatten(1)).view_as(hidden))
        if self.settings.algorithm == "u-shaped":
            hidden = parts[1](masked(self.wire, hidden.flatten(1)).view_as(hidden))
        return hidden

    def accuracy(self, inputs: Tensor, labels: Tensor, device: int | None = None) -> float:
        """The share of samples whose largest output is their label's."""
        if not len(labels):
            raise InputError("Accuracy wants at least one sample, found none.")
        return float((self.outputs(inputs, device).argmax(1) == labels).double().mean())

    def restore_optimiser(self, number: int, state: dict[str, Any]) -> None:
        """Give a device the momentum that was kept of it."""
        device = self.devices[number]
        device.optimiser = self._sgd(device.parts)
        if device.optimiser is not None:
            device.optimiser.load_state_dict(state)

    # --- an epoch ------------------------------------------------------------------------------------

    def _device(self, number: int, data: DeviceData) -> Device:
        return Device(
            number,
            data,
            list(self.shared_parts),
            num_classes=self.network.num_classes,
            wire=self.wire,
            settings=self.settings,
            loss=self.loss,
        )

    def _sgd(self, *modules: nn.Module) -> torch.optim.Optimizer | None:
        return sgd(modules, self.settings.learning_rate, self.settings.momentum)

    def _begin_epoch(self) -> None:
        if self.settings.algorithm == "splitfed-v1":
            self._tops = {}

    def _end_epoch(self) -> None:
        if self._tops:
            weights = {number: self.sizes.num_samples[number] for number in sorted(self._tops)}
            mean = weighted_mean((weights[each], flat_state(self._tops[each][0])) for each in weights)
            set_flat_state(self.top, mean)
            self._tops = {}

    def _iterate(self, iteration: Iteration, number: int, counts: EpochCounts) -> float:
        counts.iterations += 1
        quorum = self.settings.quorum * len(iteration.batches) - 1e-9
        sent = [
            batch
            for batch in iteration.batches
            if not is_lost(self.settings, self.epoch, number, batch.device)
        ]
        asked = self.exchange.present(sent, min(len(sent), math.ceil(quorum)))
        if self.settings.algorithm == "fedavg":
            losses = self.exchange.local(asked, self.epoch, number)
            arrived = [batch for batch in asked if batch.device in losses]
            loss = sum(losses.values())
        else:
            passes = self.exchange.forward(asked, self.epoch, number)
            arrived = [each.batch for each in passes]
            outcome = self._step(passes, number, quorum) if passes and len(passes) >= quorum else None
            counts.lost_batches += len(iteration.batches) - len(arrived)
            if outcome is None:
                counts.skipped_iterations += 1
                return 0.0
            self.exchange.backward(passes, outcome.gradients, self.epoch, number)
            loss = outcome.loss
        samples = sum(len(batch.rows) for batch in arrived)
        counts.samples += samples
        return loss * samples

    def _step(self, passes: Sequence[Arrived], number: int, quorum: float) -> Outcome | None:
        """Train the server's part; None where too few heads answered."""
        top, optimiser = self._top_of(passes[0].batch.device)
        received = [each.activations for each in passes]
        shape = self.exchange.fleet.facts[passes[0].batch.device].cut_shape
        if self.settings.algorithm != "u-shaped":
            labels = [each.labels for each in passes if each.labels is not None]
            return server_step(received, labels, shape, top, optimiser, self.loss)

        def ask_heads(
            features: Sequence[Tensor], feature_shape: tuple[int, ...]
        ) -> list[HeadAnswer | None] | None:
            answers = self.exchange.heads(passes, features, feature_shape, self.epoch, number)
            came = sum(answer is not None for answer in answers)
            return answers if came and came >= quorum else None

        return u_shaped_step(received, shape, top, optimiser, ask_heads)

    def _top_of(self, device: int) -> tuple[nn.Module, torch.optim.Optimizer | None]:
        if self.settings.algorithm != "splitfed-v1":
            return self.top, self.top_optimiser
        if device not in self._tops:
            top = deepcopy(self.top)
            self._tops[device] = (top, self._sgd(top))
        return self._tops[device]

    # --- sizes ---------------------------------------------------------------------------------------

    def _find_sizes(self) -> JobSizes:
        facts = self.exchange.fleet.facts
        shapes = [each.cut_shape for each in facts if each.num_samples]
        widths = {math.prod(shape) for shape in shapes}
        if len(widths) != 1:
            raise InputError(f"Wanted one width of the cut on all devices, found {sorted(widths)}.")
        return JobSizes(
            num_samples=tuple(each.num_samples for each in facts),
            batch_sizes=tuple(each.batch_size for each in facts),
            cut_width=widths.pop(),
            num_shared=num_state_elements(self.shared_parts),
            num_classes=self.network.num_classes,
            feature_width=self._feature_width(shapes[0]),
            with_own_bottom=frozenset(number for number, each in enumerate(facts) if not each.is_shared),
        )

    @torch.no_grad()
    def _feature_width(self, shape: tuple[int, ...]) -> int:
        top = deepcopy(self.top).eval()
        try:
            with torch.random.fork_rng(devices=[]):
                outcome: Tensor = top(torch.zeros(1, *shape).to(like(top)))
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(f"The top does not go with activations of the shape {shape}: {error}") from error
        return outcome[0].numel() if self.settings.algorithm == "u-shaped" else 0


def divide(network: CutNetwork, algorithm: str) -> tuple[nn.ModuleList, nn.Module]:
    """Copies of what lies on devices, and what on the server."""
    bottom, top, head = deepcopy((network.bottom, network.top, network.head))
    if algorithm == "u-shaped":
        if head is None:
            raise UsageError("A U-shaped network ends on the devices: give CutNetwork a head.")
        return nn.ModuleList([bottom, head]), top
    if algorithm == "fedavg":
        return nn.ModuleList([bottom, top, *([head] if head is not None else [])]), nn.Identity()
    return nn.ModuleList([bottom]), top if head is None else nn.Sequential(top, head)


def check_labels(data: DeviceData, number: int, num_classes: int) -> None:
    """Raise `InputError` unless all labels of a device are classes."""
    if len(data.labels) and not 0 <= int(data.labels.min()) <= int(data.labels.max()) < num_classes:
        raise InputError(
            f"Labels must be from 0 to {num_classes - 1}, found {int(data.labels.min())} to "
            f"{int(data.labels.max())} on device {number}."
        )


def _check_devices(network: CutNetwork, devices: Sequence[DeviceData], algorithm: str) -> None:
    if not any(len(data.labels) for data in devices):
        raise InputError("No device has a sample: there is nothing to train on.")
    for number, data in enumerate(devices):
        check_labels(data, number, network.num_classes)
        if data.bottom is not None and algorithm in ("fedavg", "split", "u-shaped"):
            raise UsageError(
                f"{algorithm} gives all devices the same layers, so device {number} cannot have a bottom of "
                "its own. Use joint, splitfed-v1 or splitfed-v2."
            )
