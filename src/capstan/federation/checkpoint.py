"""A job between two epochs as a file that is there whole or not at all; going on from it changes nothing."""

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from capstan.errors import InputError
from capstan.federation.cut_line import CutReceiver
from capstan.federation.job import SplitJob
from capstan.storage import write_atomically

FORMAT, VERSION = "capstan.federation", 1


def save_checkpoint(job: SplitJob, path: Path) -> None:
    """Write weights, momenta, what each device has, and what was not sent yet, after an epoch."""
    state = {
        "format": FORMAT,
        "version": VERSION,
        "of": _identity(job),
        "epoch": job.epoch,
        "average": job.exchange.version,
        "shared": job.shared_parts.state_dict(),
        "top": job.top.state_dict(),
        "top_optimiser": _optimiser_state(job.top_optimiser),
        "devices": [
            {
                "parts": device.parts.state_dict(),
                "optimiser": _optimiser_state(device.optimiser),
                "average": member.version,
            }
            for device, member in zip(job.devices, job.exchange.members, strict=True)
        ],
        "rests": {
            place: {key: torch.from_numpy(rest) for key, rest in line.rests.items()}
            for place, line in _receivers(job).items()
        },
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(job: SplitJob, path: Path) -> None:
    """Bring a new job to where the one that wrote `path` was.

    Raises:
        InputError: the file is not a checkpoint, or it is one of another job.
    """
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        told = (state["format"], state["version"])
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise InputError(f"{path} is no checkpoint: {type(error).__name__}: {error}") from error
    if told != (FORMAT, VERSION):
        raise InputError(f"Wanted a checkpoint {FORMAT} {VERSION}, found {told[0]} {told[1]}.")
    wanted, found = _identity(job), state["of"]
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        name = differing[0]
        raise InputError(
            f"{path} is of another job: its {name} is {found.get(name)}, here it is {wanted[name]}. "
            "Use another file, or the configuration that it was begun with."
        )
    job.epoch, job.exchange.version = state["epoch"], state["average"]
    job.shared_parts.load_state_dict(state["shared"])
    job.top.load_state_dict(state["top"])
    if job.top_optimiser is not None:
        job.top_optimiser.load_state_dict(state["top_optimiser"])
    for number, (device, kept) in enumerate(zip(job.devices, state["devices"], strict=True)):
        device.parts.load_state_dict(kept["parts"])
        job.exchange.members[number].version = kept["average"]
        if kept["optimiser"] is not None:
            job.restore_optimiser(number, kept["optimiser"])
    for place, line in _receivers(job).items():
        line.rests.update({key: rest.numpy() for key, rest in state["rests"][place].items()})


def _receivers(job: SplitJob) -> dict[str, CutReceiver]:
    """The ends of lines that feed errors back, by where they are."""
    cuts = {f"{number} cut": member.cut for number, member in enumerate(job.exchange.members)}
    return cuts | {f"{device.number} head": device.head for device in job.devices}


def _identity(job: SplitJob) -> dict[str, Any]:
    """What must be the same for the same job to go on."""
    sizes = job.sizes
    return {
        "settings": asdict(job.settings),
        "wire": repr(job.wire),
        "samples": list(sizes.num_samples),
        "batches": list(sizes.batch_sizes),
        "cut": sizes.cut_width,
        "parameters": job.network.num_parameters,
    }


def _optimiser_state(optimiser: torch.optim.Optimizer | None) -> dict[str, Any] | None:
    return None if optimiser is None else optimiser.state_dict()
