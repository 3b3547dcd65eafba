"""A device's process: it joins a server, builds its part of the network, and does tasks until it is over."""

from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError

from capstan.errors import InputError
from capstan.federation.config import JobConfig
from capstan.federation.data_files import Samples, read_samples
from capstan.federation.device import Device
from capstan.federation.job import check_labels, divide
from capstan.federation.members import DeviceData
from capstan.federation.messages import (
    GivenResult,
    Said,
    kind_of,
    read_json,
    read_task,
    write_json,
    write_result,
)
from capstan.federation.remote_fleet import facts_record
from capstan.federation.runs import build_network, load_run
from capstan.transport.sessions import Session

_ANSWER_S = 60.0  # the server answers within seconds; the rest is for a connection that comes back


class DeviceSource(NamedTuple):
    """The file of a device's samples, and where in it they are; see `read_samples`."""

    path: Path
    inputs: str | None = None
    label: str | None = None


def join_run(session: Session, number: int, source: DeviceSource | None = None) -> int:
    """Be device `number` of the job that the session's server runs; how many tasks were done.

    Without a `source` the device takes its part of the job's own data, which must then be here too.

    Raises:
        InputError: the server refuses this device, or its samples do not go with the job.
        TimeoutExpired: the server does not answer for a minute.
    """
    told = session.ask(write_json(Said.HELLO, {"device": number}), timeout_s=_ANSWER_S)
    device = _device(told, number, source)
    message, done = write_json(Said.FACTS, facts_record(device.facts)), 0
    while True:
        answer = session.ask(message, timeout_s=_ANSWER_S)
        said = kind_of(answer)
        if said is Said.END:
            if len(answer) > 1:
                raise InputError(f"The server gave up: {answer[1:].decode(errors='replace')}")
            return done
        message = bytes([Said.READY])
        if said is Said.TASK:
            given = read_task(answer)
            message, done = write_result(GivenResult(given.number, device.work(given.task))), done + 1
        elif said is not Said.WAIT:
            raise InputError(f"Servers do not say {said.name} to a device that works.")


def job_record(config: JobConfig, sample_shape: tuple[int, ...], num_classes: int) -> dict[str, object]:
    """What a device must know of a job, for JSON."""
    return {
        "config": config.model_dump(mode="json"),
        "sample_shape": sample_shape,
        "num_classes": num_classes,
    }


def _device(told: bytes, number: int, source: DeviceSource | None) -> Device:
    record = read_json(told)
    try:
        config = JobConfig.model_validate(record["config"])
        shape, num_classes = tuple(map(int, record["sample_shape"])), int(record["num_classes"])
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise InputError(f"The server described no job: {error}") from error
    samples = _samples(config, number, source, num_classes)
    if samples.inputs.shape[1:] != shape:
        raise InputError(
            f"The job is for samples of the shape {shape}, device {number} has {samples.inputs.shape[1:]}."
        )
    data = DeviceData(
        inputs=torch.from_numpy(samples.inputs),
        labels=torch.from_numpy(samples.labels),
        batch_size=1,  # the server says which samples make a batch
    )
    check_labels(data, number, num_classes)
    settings = config.training.settings()
    parts, _ = divide(build_network(config, shape, num_classes), settings.algorithm)
    return Device(
        number, data, list(parts), num_classes=num_classes, wire=config.wire.wire(), settings=settings
    )


def _samples(config: JobConfig, number: int, source: DeviceSource | None, num_classes: int) -> Samples:
    if source is None:
        return load_run(config).device_samples(config)[number]
    found = read_samples(source.path, inputs=source.inputs, label=source.label, num_classes=num_classes)
    return found.scaled(config.data.scale)
