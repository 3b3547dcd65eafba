"""Checkpoints that go on exactly: model, optimizer and algorithm of every rank."""

import re
from pathlib import Path
from typing import Any

import torch

from capstan.data_parallel.replica import Replica
from capstan.errors import InputError
from capstan.storage import open_atomically

_NAME = re.compile(r"step-(\d{10})\.rank-(\d+)-of-(\d+)\.pt")


def save_checkpoint(folder: Path, replica: Replica, step: int, **more: Any) -> Path:
    """Write this rank's state after `step` steps; every rank must. `more`: tensors, numbers or text to keep.

    The file appears whole or not at all. Older ones are left alone.
    """
    path = _path(folder, step, replica)
    record = {
        "format": "capstan.data_parallel.checkpoint",
        "version": 1,
        "step": step,
        "model": replica.module.state_dict(),
        "optimizer": replica.optimizer.state_dict(),
        "algorithm": replica.algorithm_state(),
        "random": torch.get_rng_state(),
        "more": more,
    }
    with open_atomically(path) as file:
        torch.save(record, file)
    return path


def load_latest(folder: Path, replica: Replica) -> tuple[int, dict[str, Any]] | None:
    """Load the last step of which every rank has a checkpoint: the step and what was kept with it.

    All ranks must call it; None where there is no such step. Restores torch's random state on the CPU, too.
    """
    own = sorted(_steps(folder, replica))
    common = set.intersection(*(set(each) for each in replica.group.gather(own)))
    if not common:
        return None
    path = _path(folder, max(common), replica)
    record = _read(path)
    replica.module.load_state_dict(record["model"])
    replica.optimizer.load_state_dict(record["optimizer"])
    replica.load_algorithm_state(record["algorithm"])
    torch.set_rng_state(record["random"])
    return record["step"], record["more"]


def _read(path: Path) -> dict[str, Any]:
    try:
        record = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises whatever the damage leads to
        raise InputError(
            f"The checkpoint {path} cannot be read: {error}. Delete it to go on from before."
        ) from error
    if not isinstance(record, dict) or record.get("format") != "capstan.data_parallel.checkpoint":
        raise InputError(f"{path} is not a checkpoint of data-parallel training.")
    if record["version"] != 1:
        raise InputError(f"Wanted checkpoint version 1, found {record['version']} in {path}: update Capstan.")
    return record


def _steps(folder: Path, replica: Replica) -> set[int]:
    names = (_NAME.fullmatch(path.name) for path in folder.glob("step-*.pt"))
    own = (replica.group.rank, replica.group.size)
    return {int(name[1]) for name in names if name and (int(name[2]), int(name[3])) == own}


def _path(folder: Path, step: int, replica: Replica) -> Path:
    return folder / f"step-{step:010d}.rank-{replica.group.rank}-of-{replica.group.size}.pt"
