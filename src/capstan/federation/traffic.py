"""What split training sends, from dimensions alone, beside federated averaging. NumPy only.

For devices that send batches of N samples through a cut of d elements, of which k are kept a sample:

    federated averaging  2 P b_w bytes a round           split, dense     N d (b_v + b_v) a batch
    split, sparse        N k b_v + index up,  N k b_v down,  N labels up a batch
    averaged bottoms     2 P_bottom b_w an average
    break-even           s* = bytes of a round / bytes of a batch

Three corrections to a comparison by iteration, all reported: positions cost bytes too; federated averaging
sends once a round of many batches, so that the ratio for an epoch is larger, and above s* batches a round it
sends less; the gradient needs no positions, because it lives on those of the activations.

Source: Yuan et al., arXiv 2005.05083; `published_account` counts as it does: 32-bit values, no index.
"""

from dataclasses import dataclass
from typing import Any

from capstan.errors import UsageError
from capstan.federation.index_codes import INDEX_CODES
from capstan.federation.packets import Sizes
from capstan.federation.sparsifiers import TopK
from capstan.federation.value_codes import FLOATING
from capstan.federation.wire import Wire, label_sizes, weight_sizes
from capstan.plans import Alternative, Choice, Phase, Plan, Traffic, bytes_text, link_name

UP, DOWN = link_name("devices", "server"), link_name("server", "devices")
_WEIGHT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class DeviceLink:
    """The network of one device; devices send side by side."""

    up_bytes_per_s: float = 1e6
    down_bytes_per_s: float = 1e6
    round_trip_s: float = 0.05

    def __post_init__(self) -> None:
        if not (self.up_bytes_per_s > 0 and self.down_bytes_per_s > 0 and self.round_trip_s >= 0):
            raise UsageError(f"A link needs positive rates and a round trip of at least 0 s, found {self}.")

    def seconds(self, up_bytes: float, down_bytes: float, round_trips: float = 1) -> float:
        """How long these bytes of one device take, one direction after the other."""
        return (
            up_bytes / self.up_bytes_per_s
            + down_bytes / self.down_bytes_per_s
            + round_trips * self.round_trip_s
        )


@dataclass(frozen=True, kw_only=True)
class CutDimensions:
    """A cut network's sizes: `num_parameters` of all layers, `num_bottom_parameters` of those on devices."""

    cut_width: int
    batch: int
    num_devices: int
    num_parameters: int
    num_bottom_parameters: int = 0
    average_every: int = 1
    num_classes: int = 2
    num_samples: int | None = None

    def __post_init__(self) -> None:
        for name in ("cut_width", "batch", "num_devices", "num_parameters", "average_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, found {getattr(self, name)}.")
        if not 0 <= self.num_bottom_parameters <= self.num_parameters:
            raise UsageError(
                f"The bottom has 0 to {self.num_parameters} parameters, found {self.num_bottom_parameters}."
            )
        if self.num_samples is not None and self.num_samples < self.num_devices:
            raise UsageError(f"{self.num_samples} samples do not reach for {self.num_devices} devices.")

    @property
    def fedavg_bytes(self) -> int:
        """A round of federated averaging, one device: the model down and up, 32 bits a weight."""
        return 2 * _WEIGHT_BYTES * self.num_parameters

    @property
    def steps_per_epoch(self) -> float | None:
        """Batches that a device sends in an epoch, if equal parts are dealt."""
        return None if self.num_samples is None else self.num_samples / self.num_devices / self.batch


@dataclass(frozen=True, kw_only=True)
class IterationBytes:
    """What one device sends and receives for one batch. Averages of bottoms are spread over batches."""

    activations: Sizes
    gradients: Sizes
    labels: Sizes
    weights_one_way: float

    @property
    def up(self) -> float:
        return self.activations.total + self.labels.total + self.weights_one_way

    @property
    def down(self) -> float:
        return self.gradients.total + self.weights_one_way

    @property
    def index(self) -> int:
        return self.activations.index + self.gradients.index

    def traffic(self, num_devices: int) -> Traffic:
        """That of all devices, by direction and kind."""
        parts = (
            (UP, "values", self.activations.values),
            (UP, "index", self.activations.index),
            (UP, "labels", self.labels.values),
            (UP, "framing", self.activations.framing + self.labels.framing),
            (UP, "weights", self.weights_one_way),
            (DOWN, "values", self.gradients.values),
            (DOWN, "index", self.gradients.index),
            (DOWN, "framing", self.gradients.framing),
            (DOWN, "weights", self.weights_one_way),
        )
        return Traffic({(link, kind): round(num_devices * size) for link, kind, size in parts})


def iteration_bytes(dimensions: CutDimensions, wire: Wire) -> IterationBytes:
    """The bytes of one batch through the cut; where Rice codes, those expected of random positions."""
    bottom = dimensions.num_bottom_parameters
    return IterationBytes(
        activations=wire.forward_sizes(dimensions.batch, dimensions.cut_width),
        gradients=wire.backward_sizes(dimensions.batch, dimensions.cut_width),
        labels=label_sizes(dimensions.batch, dimensions.num_classes),
        weights_one_way=weight_sizes(bottom).total / dimensions.average_every if bottom else 0.0,
    )


def smallest_index(dimensions: CutDimensions, keep: float, value_type: str) -> str:
    """The index code whose message is smallest, as expected of random positions."""

    def size(index: str) -> int:
        wire = Wire(sparsifier=TopK(keep=keep), index=index, value_type=value_type)
        return wire.forward_sizes(dimensions.batch, dimensions.cut_width).total

    return min(sorted(INDEX_CODES), key=size)


def published_account(dimensions: CutDimensions, keep: float) -> dict[str, int]:
    """Bytes of an iteration of all devices as the paper counts them: 32-bit values, no index, no labels.

    For (10.6e6 parameters, d = 8192, batch 32) and 32 devices: 2.72 GB, 64 MiB and 6.4 MiB.
    """
    elements = dimensions.batch * dimensions.cut_width
    one_device = {
        "fedavg_bytes": dimensions.fedavg_bytes,
        "split_bytes": 2 * 4 * elements,
        "sparse_bytes": 2 * 4 * int(keep * elements + 1e-9),
    }
    return {name: dimensions.num_devices * size for name, size in one_device.items()}


def traffic_report(dimensions: CutDimensions, wire: Wire, keep: float) -> dict[str, Any]:
    """All figures of a comparison with federated averaging, fit for JSON.

    `bytes_up`, `bytes_down` and `index_bytes` are those of one iteration of all devices.
    """
    sent = iteration_bytes(dimensions, wire)
    devices, batch_bytes = dimensions.num_devices, sent.up + sent.down
    steps = dimensions.steps_per_epoch
    return {
        "bytes_up": round(devices * sent.up),
        "bytes_down": round(devices * sent.down),
        "index_bytes": devices * sent.index,
        "bytes_by_kind": sent.traffic(devices).to_dict(),
        "per_device": {
            "bytes_up": round(sent.up),
            "bytes_down": round(sent.down),
            "index_bytes": sent.index,
            "fedavg_round_bytes": dimensions.fedavg_bytes,
        },
        "fedavg_bytes": devices * dimensions.fedavg_bytes,
        "per_iteration_vs_fedavg": batch_bytes / dimensions.fedavg_bytes,
        "per_epoch_bytes": None if steps is None else round(devices * steps * batch_bytes),
        "per_epoch_vs_fedavg": None if steps is None else steps * batch_bytes / dimensions.fedavg_bytes,
        "local_steps_per_epoch": steps,
        "break_even_local_steps": dimensions.fedavg_bytes / batch_bytes,
        "is_exact": wire.is_size_known(dimensions.batch, dimensions.cut_width),
        "published": published_account(dimensions, keep),
        "encodings": [
            _encoding(dimensions, keep, index, value) for value in FLOATING for index in INDEX_CODES
        ],
    }


def _encoding(dimensions: CutDimensions, keep: float, index: str, value_type: str) -> dict[str, Any]:
    sent = iteration_bytes(dimensions, Wire(sparsifier=TopK(keep=keep), index=index, value_type=value_type))
    return {
        "index": index,
        "values": value_type,
        "bytes_per_device": round(sent.up + sent.down),
        "vs_fedavg": (sent.up + sent.down) / dimensions.fedavg_bytes,
    }


def plan_iteration(dimensions: CutDimensions, wire: Wire, link: DeviceLink, report: dict[str, Any]) -> Plan:
    """The plan of one iteration on such links; computing is not part of it."""
    sent = iteration_bytes(dimensions, wire)
    seconds = link.seconds(sent.up, sent.down)
    busy_s = {UP: sent.up / link.up_bytes_per_s, DOWN: sent.down / link.down_bytes_per_s}
    dense = 4 * dimensions.batch * dimensions.cut_width
    round_s = link.seconds(dimensions.fedavg_bytes / 2, dimensions.fedavg_bytes / 2)
    ratio, steps = report["per_iteration_vs_fedavg"], report["break_even_local_steps"]
    choices = [
        Choice(
            name="index",
            value=wire.forward_index(),
            reason=f"{bytes_text(sent.index)} a device and batch; the gradient needs none",
        ),
        Choice(name="values", value=wire.value_type),
        Choice(
            name="against federated averaging",
            value=f"{ratio:.3%} of a round by iteration",
            reason=f"it sends less from {steps:.0f} local batches a round on",
        ),
    ]
    if report["per_epoch_vs_fedavg"] is not None:
        choices.append(
            Choice(
                name="over an epoch",
                value=f"{report['per_epoch_vs_fedavg']:.1%} of a round",
                reason=f"{report['local_steps_per_epoch']:.1f} batches a device, one model each way",
            )
        )
    return Plan(
        system="federation",
        title=f"{dimensions.num_devices} devices of {dimensions.batch} samples, cut {dimensions.cut_width}",
        machine="dimensions alone",
        phases=(
            Phase(
                name="iteration",
                seconds=seconds,
                busy_s=busy_s,
                traffic=sent.traffic(dimensions.num_devices),
                counts={"samples": dimensions.num_devices * dimensions.batch},
            ),
        ),
        choices=tuple(choices),
        decision={name: value for name, value in report.items() if name != "encodings"},
        bound=f"the slowest way of a device's link: {max(busy_s, key=lambda name: busy_s[name])}",
        alternatives=(
            Alternative(
                name="dense split, 32 bits",
                seconds=link.seconds(dense, dense),
                reason=f"{bytes_text(2 * dense)} a device and batch",
            ),
            Alternative(
                name="federated averaging",
                seconds=round_s,
                reason=f"{bytes_text(dimensions.fedavg_bytes)} a device and round of any number of batches",
            ),
        ),
    )
