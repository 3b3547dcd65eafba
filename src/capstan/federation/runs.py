"""From a configuration to a plan, and from a plan to a trained network with its trace."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from capstan.errors import InputError
from capstan.federation.checkpoint import load_checkpoint, save_checkpoint
from capstan.federation.config import JobConfig
from capstan.federation.data_files import Samples, generate_samples, read_samples, split_off_test
from capstan.federation.job import EpochCounts, SplitJob
from capstan.federation.layers import build_layers
from capstan.federation.members import CutNetwork, DeviceData
from capstan.federation.partition import partition
from capstan.federation.planner import Forecast
from capstan.federation.schedule import epoch_iterations
from capstan.federation.tasks import Fleet
from capstan.federation.traffic import DOWN, UP
from capstan.plans import Alternative, Choice, Phase, Plan, Trace, bytes_text, seconds_text


class Place(NamedTuple):
    """Where a job's devices are, and what then bounds its speed."""

    machine: str
    bound: str


IN_PROCESS = Place(
    "this process", "the processor: all devices compute in this process and nothing waits for a link"
)
OVER_SESSIONS = Place(
    "devices of their own", "the slowest device and its link; the seconds planned are those of one process"
)
# In one process nothing waits for a link; named, so that a comparison shows its bytes.
_NO_LINK_S = {UP: 0.0, DOWN: 0.0}


class LoadedRun(NamedTuple):
    """What a job has before its devices: samples to train on and to test with, and its network."""

    train: Samples
    test: Samples
    network: CutNetwork

    @property
    def judged(self) -> tuple[Tensor, Tensor]:
        """The test's inputs and labels."""
        return torch.from_numpy(self.test.inputs), torch.from_numpy(self.test.labels)

    def device_samples(self, config: JobConfig) -> list[Samples]:
        """What lies on each device, where they bring no samples of their own."""
        devices = config.devices
        parts = partition(
            self.train.labels,
            devices.count,
            scheme=devices.partition,
            alpha=devices.alpha,
            seed=config.training.seed,
        )
        return [self.train.take(part) for part in parts]


class PreparedRun(NamedTuple):
    """A job that can start, what it is tested with, and its plan."""

    config: JobConfig
    job: SplitJob
    test: tuple[Tensor, Tensor]
    plan: Plan


class FinishedRun(NamedTuple):
    """What came of it: the trace, and each epoch's accuracy and counts."""

    trace: Trace
    accuracy: list[float]
    epochs: list[EpochCounts]


def prepare_run(config: JobConfig, checkpoint: Path | None = None) -> PreparedRun:
    """Read data, build the network, and plan what is left to do after `checkpoint`, if that is there."""
    loaded = load_run(config)
    parts = loaded.device_samples(config)
    batches = config.devices.batches([len(part.labels) for part in parts])
    devices = [_device_data(part, batch) for part, batch in zip(parts, batches, strict=True)]
    job = SplitJob(
        network=loaded.network, devices=devices, wire=config.wire.wire(), settings=config.training.settings()
    )
    if checkpoint is not None and checkpoint.exists():
        load_checkpoint(job, checkpoint)
    return PreparedRun(config, job, loaded.judged, _plan(config, job, devices, IN_PROCESS))


def prepare_served_run(config: JobConfig, loaded: LoadedRun, fleet: Fleet) -> PreparedRun:
    """The same over devices that have joined; seconds are planned as if all were in one process."""
    job = SplitJob(
        network=loaded.network, fleet=fleet, wire=config.wire.wire(), settings=config.training.settings()
    )
    sample = torch.zeros(1, *loaded.train.inputs.shape[1:])
    blanks = [
        DeviceData(
            inputs=sample.expand(each.num_samples, *sample.shape[1:]),
            labels=torch.zeros(each.num_samples, dtype=torch.int64),
            batch_size=each.batch_size,
        )
        for each in fleet.facts
    ]
    return PreparedRun(config, job, loaded.judged, _plan(config, job, blanks, OVER_SESSIONS))


def train_run(
    run: PreparedRun,
    checkpoint: Path | None = None,
    on_epoch: Callable[[EpochCounts, float], None] | None = None,
) -> FinishedRun:
    """Train what is left; after each epoch the job is kept in `checkpoint`."""
    counts, accuracy, seconds = [], [], 0.0
    before = run.job.ledger.traffic
    while run.job.epoch < run.config.training.epochs:
        counts.append(run.job.run_epoch())
        seconds += counts[-1].seconds
        accuracy.append(run.job.accuracy(*run.test))
        if checkpoint is not None:
            save_checkpoint(run.job, checkpoint)
        if on_epoch is not None:
            on_epoch(counts[-1], accuracy[-1])
    lost, skipped = sum(each.lost_batches for each in counts), sum(each.skipped_iterations for each in counts)
    phase = Phase(
        name="training",
        seconds=seconds,
        busy_s={"compute": seconds, **_NO_LINK_S},
        traffic=run.job.ledger.traffic - before,
        counts={
            "samples": sum(each.samples for each in counts),
            "iterations": sum(each.iterations for each in counts),
        },
    )
    notes = [f"{lost} batches were lost and {skipped} iterations skipped."] if lost else []
    trace = Trace(
        system="federation",
        title=run.plan.title,
        machine=run.plan.machine,
        phases=(phase,),
        notes=tuple(notes),
    )
    return FinishedRun(trace, accuracy, counts)


def run_report(run: PreparedRun, finished: FinishedRun | None) -> dict[str, Any]:
    """A run as JSON."""
    report: dict[str, Any] = {"plan": run.plan.to_dict()}
    if finished is not None:
        report |= {
            "trace": finished.trace.to_dict(),
            "accuracy": finished.accuracy,
            "epochs": [asdict(each) for each in finished.epochs],
        }
    return report


def load_run(config: JobConfig) -> LoadedRun:
    """Read or generate the data of a job, and build its network.

    Raises:
        InputError: the data are not there, or do not go with the network.
    """
    data = config.data
    if data.generate is not None:
        found = generate_samples(**data.generate.model_dump())
    else:
        assert data.path is not None
        found = read_samples(data.path, inputs=data.inputs, label=data.label)
    train, test = split_off_test(found.scaled(data.scale), data.test_fraction, config.training.seed)
    if not len(test.labels) or not len(train.labels):
        raise InputError(f"{len(found.labels)} samples leave none to train on or none to test with.")
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    return LoadedRun(train, test, build_network(config, tuple(train.inputs.shape[1:]), num_classes))


def build_network(config: JobConfig, sample_shape: tuple[int, ...], num_classes: int) -> CutNetwork:
    """The network of a job, the same wherever it is built."""
    layers, shapes = build_layers(config.model.layers, sample_shape, seed=config.training.seed)
    if shapes[-1] != (num_classes,):
        raise InputError(
            f"The last layer gives {shapes[-1]} a sample, the data have {num_classes} classes: make them "
            "the same."
        )
    cut, head = config.model.cut, config.model.head
    is_u_shaped = head is not None and head < len(layers)
    return CutNetwork(
        bottom=nn.Sequential(*layers[:cut]),
        top=nn.Sequential(*layers[cut:head]),
        head=nn.Sequential(*layers[head:]) if is_u_shaped else None,
        num_classes=num_classes,
    )


def _device_data(part: Samples, batch: int) -> DeviceData:
    return DeviceData(
        inputs=torch.from_numpy(part.inputs), labels=torch.from_numpy(part.labels), batch_size=batch
    )


def _plan(config: JobConfig, job: SplitJob, devices: Sequence[DeviceData], place: Place) -> Plan:
    epochs = max(0, config.training.epochs - job.epoch)
    link = config.link.link()
    found = job.forecast(epochs, link)
    compute_s = _iteration_s(job, devices) * found.iterations if epochs else 0.0
    return Plan(
        system="federation",
        title=f"{config.training.algorithm} on {config.devices.count} devices, {epochs} epochs",
        machine=place.machine,
        phases=(
            Phase(
                name="training",
                seconds=compute_s,
                busy_s={"compute": compute_s, **_NO_LINK_S},
                traffic=found.traffic,
                counts={"samples": found.samples, "iterations": found.iterations},
            ),
        ),
        choices=_choices(config, job, found, epochs),
        decision=config.model_dump(mode="json"),
        bound=place.bound,
        alternatives=(_fedavg(job, found, epochs, link.seconds, compute_s),) if epochs else (),
    )


def _choices(config: JobConfig, job: SplitJob, found: Forecast, epochs: int) -> tuple[Choice, ...]:
    sizes = job.sizes
    exactness = "exact" if found.is_exact else "an estimate: positions, values or losses decide"
    choices = [
        Choice(
            name="cut", value=f"{sizes.cut_width} elements a sample", reason=f"{sizes.num_shared} averaged"
        ),
        Choice(
            name="bytes",
            value=f"{bytes_text(found.traffic.on(UP))} up, {bytes_text(found.traffic.on(DOWN))} down",
            reason=exactness,
        ),
        Choice(name="on such links", value=seconds_text(found.link_s), reason="without computing"),
    ]
    if epochs and found.iterations:
        round_bytes = 2 * 4 * job.network.num_parameters * sum(1 for size in sizes.num_samples if size)
        sent = found.traffic.on(UP) + found.traffic.on(DOWN)
        choices.append(
            Choice(
                name="against federated averaging",
                value=f"{sent / found.iterations / round_bytes:.3%} by iteration",
                reason=f"{sent / epochs / round_bytes:.1%} by epoch, index, labels and averages counted",
            )
        )
    every = config.training.average_every
    if job.settings.is_joint and every != 1:
        choices.append(
            Choice(
                name="averages",
                value=f"every {every}" if every == "epoch" else f"every {every} iterations",
                reason="WARNING: bottoms drift apart in between; accuracy falls where labels are uneven",
            )
        )
    return tuple(choices)


def _fedavg(
    job: SplitJob, found: Forecast, epochs: int, seconds: Callable[[float, float], float], compute_s: float
) -> Alternative:
    one_way = 4 * job.network.num_parameters
    return Alternative(
        name="federated averaging each epoch",
        seconds=compute_s + epochs * seconds(one_way, one_way),
        reason=f"{bytes_text(2 * one_way)} a device and epoch, over such links",
    )


def _iteration_s(job: SplitJob, devices: Sequence[DeviceData]) -> float:
    """Seconds of the first iteration, tried on a job of its own; the second try counts."""
    trial = SplitJob(
        network=job.network, devices=devices, wire=job.wire, settings=job.settings, loss=job.loss
    )
    sizes = trial.sizes
    first = next(epoch_iterations(sizes.num_samples, sizes.batch_sizes, job.settings, 0))
    seconds = 0.0
    with torch.random.fork_rng(devices=[]):
        for _ in range(2):
            started = time.perf_counter()
            trial.train_iteration(first, 0, EpochCounts(epoch=0))
            seconds = time.perf_counter() - started
    return seconds
