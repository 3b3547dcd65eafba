"""Checkpoints that go on exactly: model, optimizer and algorithm of every rank."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capstan.data_parallel.replica import Replica
from capstan.errors import InputError, UsageError
from capstan.storage import open_atomically

_NAME = re.compile(r"step-(\d{10})\.rank-(\d+)-of-(\d+)\.pt")


def save_checkpoint(folder: Path | str, replica: Replica, step: int, **more: Any) -> Path:
    """Write this rank's state after `step` steps; every rank must. `more`: tensors, numbers, text, and lists
    and dictionaries of them, to keep.

    The file appears whole or not at all. Older ones are left alone.

    Raises:
        UsageError: something in `more` could not be loaded again.
    """
    path = _path(Path(folder), step, replica)
    more = {name: _loadable(name, value) for name, value in more.items()}
    record = {
        "format": "capstan.data_parallel.checkpoint",
        "version": 1,
        "step": step,
        "model": replica.module.state_dict(),
        "optimizer": _optimizer_of(replica).state_dict(),
        "algorithm": replica.algorithm_state(),
        "random": torch.get_rng_state(),
        "more": more,
    }
    with open_atomically(path) as file:
        torch.save(record, file)
    return path


def load_latest(folder: Path | str, replica: Replica) -> tuple[int, dict[str, Any]] | None:
    """Load the last step of which every rank has a checkpoint: the step and what was kept with it.

    All ranks must call it; None where there is no such step. Restores torch's random state on the CPU, too.
    """
    folder = Path(folder)
    found = _found(folder)
    own = sorted(
        step for step, rank, size in found if (rank, size) == (replica.group.rank, replica.group.size)
    )
    common = set.intersection(*(set(each) for each in replica.group.gather(own)))
    if not common:
        sizes = sorted({size for _, _, size in found} - {replica.group.size})
        if sizes:
            raise InputError(
                f"{folder} has checkpoints of {' and of '.join(map(str, sizes))} ranks; these are "
                f"{replica.group.size}. Start as many as before, or name another folder to begin anew."
            )
        return None
    path = _path(folder, max(common), replica)
    record = _read(path)
    replica.module.load_state_dict(record["model"])
    _optimizer_of(replica).load_state_dict(record["optimizer"])
    replica.load_algorithm_state(record["algorithm"])
    torch.set_rng_state(record["random"])
    return record["step"], record["more"]


def _optimizer_of(replica: Replica) -> torch.optim.Optimizer:
    if replica.optimizer is None:
        raise UsageError("A checkpoint keeps the optimizer's state: give the optimizer to wrap().")
    return replica.optimizer


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


def _loadable(name: str, value: Any) -> Any:
    """What is kept. Only what is no code can be read back: anything else is refused before it is written."""
    if isinstance(value, np.generic):
        value = value.item()
    kept = io.BytesIO()
    torch.save(value, kept)
    kept.seek(0)
    try:
        torch.load(kept, weights_only=True)
    except Exception as error:  # torch raises whatever it meets
        raise UsageError(
            f"{name} is {type(value).__name__}, or holds something, that a checkpoint does not keep: it "
            "takes tensors, numbers, text, and lists and dictionaries of them."
        ) from error
    return value


def _found(folder: Path) -> list[tuple[int, int, int]]:
    """Step, rank and number of ranks of every checkpoint."""
    names = (_NAME.fullmatch(path.name) for path in folder.glob("step-*.pt"))
    return [(int(name[1]), int(name[2]), int(name[3])) for name in names if name]


def _path(folder: Path, step: int, replica: Replica) -> Path:
    return folder / f"step-{step:010d}.rank-{replica.group.rank}-of-{replica.group.size}.pt"
