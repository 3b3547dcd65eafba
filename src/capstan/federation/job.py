"""A network cut between devices and a server, trained in one process: what crosses is written and read."""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capstan.errors import InputError, UsageError
from capstan.federation.cut_line import CutLine, masked, send_labels, send_weights
from capstan.federation.iterations import ForwardPass, Loss, local_step, server_step, u_shaped_step
from capstan.federation.members import (
    CutNetwork,
    Device,
    DeviceData,
    flat_state,
    num_state_elements,
    set_flat_state,
    sgd,
    weighted_mean,
)
from capstan.federation.planner import Forecast, JobSizes, forecast
from capstan.federation.schedule import Batch, Iteration, Settings, epoch_iterations, is_lost
from capstan.federation.traffic import DOWN, UP, DeviceLink
from capstan.federation.wire import Wire
from capstan.transport.ledger import Ledger

_JUDGED_AT_ONCE = 256
_FRESH_OPTIMISERS = ("fedavg", "split", "splitfed-v1", "splitfed-v2")


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
        devices: Sequence[DeviceData],
        wire: Wire | None = None,
        settings: Settings | None = None,
        loss: Loss = nn.functional.cross_entropy,
    ) -> None:
        self.wire, self.settings, self.loss = wire or Wire(), settings or Settings(), loss
        self.network, self.ledger, self.epoch = network, Ledger(), 0
        on_device, self.top = _divide(network, self.settings.algorithm)
        _check_devices(network, devices, self.settings.algorithm)
        self.version = 0
        self._shared_parts = deepcopy(on_device)
        self.devices = []
        for data in devices:
            parts = on_device if data.bottom is None else nn.ModuleList([data.bottom, *on_device[1:]])
            self.devices.append(Device(data, parts, is_shared=data.bottom is None))
        self.top_optimiser = self._sgd(self.top)
        self._tops: dict[int, tuple[nn.Module, torch.optim.Optimizer | None]] = {}
        self.lines = {
            (number, way): CutLine(self.wire, self.ledger, links, number, self.settings.seed)
            for number in range(len(devices))
            for way, links in (("cut", (UP, DOWN)), ("head", (DOWN, UP)))
        }
        self.sizes = self._find_sizes()

    def forecast(self, epochs: int, link: DeviceLink | None = None) -> Forecast:
        """What the next `epochs` will send; without losses, and in codes of known size, exactly."""
        fresh = {number: device.version == self.version for number, device in enumerate(self.devices)}
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
            self._average(iteration.averaged)
        return loss_sum

    @torch.no_grad()
    def outputs(self, inputs: Tensor, device: int | None = None) -> Tensor:
        """The network's outputs with what is sent masked and rounded as in training, 256 samples at a time.

        `device` names one with a bottom of its own; else it is the average of those that share theirs.
        """
        if device is None and not any(each.is_shared for each in self.devices):
            raise UsageError("Every device has a bottom of its own: say which device's is meant.")
        parts = self._shared_parts if device is None else self.devices[device].parts
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

    @property
    def shared_parts(self) -> nn.ModuleList:
        """The device part as last averaged, which the server has."""
        return self._shared_parts

    def restore_optimiser(self, number: int, state: dict[str, Any]) -> None:
        """Give a device the momentum that was kept of it."""
        device = self.devices[number]
        device.optimiser = self._sgd(device.parts)
        if device.optimiser is not None:
            device.optimiser.load_state_dict(state)

    # --- an epoch ------------------------------------------------------------------------------------

    def _sgd(self, *modules: nn.Module) -> torch.optim.Optimizer | None:
        return sgd(modules, self.settings.learning_rate, self.settings.momentum)

    def _begin_epoch(self) -> None:
        if self.settings.algorithm in _FRESH_OPTIMISERS:
            for device in self.devices:
                device.optimiser = None
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
        arrived = [
            batch
            for batch in iteration.batches
            if not is_lost(self.settings, self.epoch, number, batch.device)
        ]
        counts.lost_batches += len(iteration.batches) - len(arrived)
        for batch in arrived:
            self._fetch(batch.device, number)
        if self.settings.algorithm == "fedavg":
            (batch,) = arrived
            device = self.devices[batch.device]
            loss = local_step(device, *device.batch(torch.from_numpy(batch.rows)), self.loss)
        else:
            passes = [self._forward(batch, number) for batch in arrived]
            if not passes or len(passes) < self.settings.quorum * len(iteration.batches) - 1e-9:
                counts.skipped_iterations += 1
                return 0.0
            top, optimiser = self._top_of(arrived[0].device)
            step = u_shaped_step if self.settings.algorithm == "u-shaped" else server_step
            loss = step(passes, top, optimiser, self.loss, number)
        samples = sum(len(batch.rows) for batch in arrived)
        for batch in arrived:
            self.devices[batch.device].samples_since_average += len(batch.rows)
        counts.samples += samples
        return loss * samples

    def _top_of(self, device: int) -> tuple[nn.Module, torch.optim.Optimizer | None]:
        if self.settings.algorithm != "splitfed-v1":
            return self.top, self.top_optimiser
        if device not in self._tops:
            top = deepcopy(self.top)
            self._tops[device] = (top, self._sgd(top))
        return self._tops[device]

    def _forward(self, batch: Batch, step: int) -> ForwardPass:
        device, line = self.devices[batch.device], self.lines[batch.device, "cut"]
        inputs, labels = device.batch(torch.from_numpy(batch.rows))
        activations = device.parts[0](inputs)
        received = line.forward(activations.flatten(1), step)
        is_u_shaped = self.settings.algorithm == "u-shaped"
        if not is_u_shaped:
            labels = send_labels(self.ledger, UP, labels, self.network.num_classes, batch.device, step)
        return ForwardPass(
            device=device,
            activations=activations,
            received=received,
            labels=labels,
            line=line,
            head_line=self.lines[batch.device, "head"] if is_u_shaped else None,
        )

    # --- averages ------------------------------------------------------------------------------------

    def _fetch(self, number: int, step: int) -> None:
        """Bring a device up to the newest average, if it has not got it."""
        device = self.devices[number]
        if device.is_shared and device.version != self.version:
            if self.sizes.num_shared:
                state = send_weights(self.ledger, DOWN, flat_state(self._shared_parts), number, step)
                set_flat_state(device.parts, state)
            device.version = self.version
        if device.optimiser is None:
            device.optimiser = self._sgd(device.parts)

    def _average(self, numbers: Sequence[int]) -> None:
        """Average the device parts of those that have trained since the last time, by their samples."""
        states = []
        for number in numbers:
            device = self.devices[number]
            if device.is_shared and device.samples_since_average and self.sizes.num_shared:
                state = send_weights(self.ledger, UP, flat_state(device.parts), number, 0)
                states.append((float(device.samples_since_average), state))
            device.samples_since_average = 0
        if states:
            set_flat_state(self._shared_parts, weighted_mean(states))
            self.version += 1

    # --- sizes ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _find_sizes(self) -> JobSizes:
        with torch.random.fork_rng(devices=[]):
            widths = {self._width(device) for device in self.devices if len(device.data.labels)}
        if len(widths) != 1:
            raise InputError(f"Wanted one width of the cut on all devices, found {sorted(widths)}.")
        cut_width, feature_width = next(iter(widths))
        return JobSizes(
            num_samples=tuple(len(device.data.labels) for device in self.devices),
            batch_sizes=tuple(device.data.batch_size for device in self.devices),
            cut_width=cut_width,
            num_shared=num_state_elements(self._shared_parts),
            num_classes=self.network.num_classes,
            feature_width=feature_width,
            with_own_bottom=frozenset(
                number for number, device in enumerate(self.devices) if not device.is_shared
            ),
        )

    def _width(self, device: Device) -> tuple[int, int]:
        bottom, top = deepcopy(device.parts[0]).eval(), deepcopy(self.top).eval()
        try:
            hidden = bottom(device.data.inputs[:1])
            outcome = top(hidden)
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(
                f"The network does not go with samples of the shape "
                f"{tuple(device.data.inputs.shape[1:])} and type {device.data.inputs.dtype}: {error}"
            ) from error
        return hidden[0].numel(), outcome[0].numel() if self.settings.algorithm == "u-shaped" else 0


def _divide(network: CutNetwork, algorithm: str) -> tuple[nn.ModuleList, nn.Module]:
    """What lies on devices, and what on the server."""
    bottom, top, head = deepcopy((network.bottom, network.top, network.head))
    if algorithm == "u-shaped":
        if head is None:
            raise UsageError("A U-shaped network ends on the devices: give CutNetwork a head.")
        return nn.ModuleList([bottom, head]), top
    if algorithm == "fedavg":
        return nn.ModuleList([bottom, top, *([head] if head is not None else [])]), nn.Identity()
    return nn.ModuleList([bottom]), top if head is None else nn.Sequential(top, head)


def _check_devices(network: CutNetwork, devices: Sequence[DeviceData], algorithm: str) -> None:
    if not any(len(data.labels) for data in devices):
        raise InputError("No device has a sample: there is nothing to train on.")
    for number, data in enumerate(devices):
        if (
            len(data.labels)
            and not 0 <= int(data.labels.min()) <= int(data.labels.max()) < network.num_classes
        ):
            raise InputError(
                f"Labels must be from 0 to {network.num_classes - 1}, found {int(data.labels.min())} to "
                f"{int(data.labels.max())} on device {number}."
            )
        if data.bottom is not None and algorithm in ("fedavg", "split", "u-shaped"):
            raise UsageError(
                f"{algorithm} gives all devices the same layers, so device {number} cannot have a bottom of "
                "its own. Use joint, splitfed-v1 or splitfed-v2."
            )
