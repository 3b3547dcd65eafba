"""One rank of `capstan train pipeline`: trains, keeps checkpoints, and tells what it measured.

python -m torch.distributed.run --nproc-per-node=4 -m capstan.pipelining.training '{"settings": …}'
"""

import ctypes
import json
import os
import platform
import re
import signal
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from capstan.errors import CapstanError, InputError
from capstan.models import Stage, save_stage
from capstan.pipelining.decoder import token_loss
from capstan.pipelining.pipeline import Pipeline
from capstan.pipelining.planner import FIRST, LATER
from capstan.pipelining.settings import Settings
from capstan.plans import Phase, Trace, Traffic
from capstan.storage import open_atomically, write_atomically

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_NAME = re.compile(r"epoch-(\d{6})\.stage-(\d+)-of-(\d+)\.pt")


def train(settings: Settings, folder: Path | None = None, output: Path | None = None) -> dict[str, Any]:
    """Train this rank's stage, from the last checkpoint in `folder` if there is one.

    Args:
        output: where a model that was read from a folder is written, in Hugging Face format.

    Returns:
        `loss`, `held_out_loss` and `wire_bytes` for each epoch, and a `trace`; the same on every rank.
    """
    samples, held_out = settings.samples()
    pipeline = Pipeline(
        settings.stage(dist.get_rank()),
        token_loss,
        num_micro_batches=settings.micro_batches,
        schedule=settings.schedule,
        compression=settings.compression,
        patience_s=settings.patience_s,
    )
    optimizer = torch.optim.AdamW(pipeline.parameters(), lr=settings.learning_rate)
    told: dict[str, list[Any]] = {"loss": [], "held_out_loss": [], "wire_bytes": []}
    start = 0
    if folder is not None:
        start, kept = load_latest(folder, pipeline, optimizer, settings)
        told |= kept
    phases: list[Phase] = []
    for epoch in range(start, settings.epochs):
        phase, loss = _epoch(pipeline, optimizer, settings, samples, epoch)
        phases.append(phase)
        if (broken := pipeline.repair()) and pipeline.group.is_first:
            print(
                f"epoch {epoch + 1}: the ends of boundaries {broken} differed, and forgot what they held",
                file=sys.stderr,
            )
        told["loss"].append(loss)
        told["held_out_loss"].append(_held_out_loss(pipeline, held_out, settings.batch))
        told["wire_bytes"].append(sum(phase.traffic.size_bytes.values()))
        if folder is not None:
            save(folder, pipeline, optimizer, settings, epoch + 1, told)
        if pipeline.group.is_first:
            print(
                f"epoch {epoch + 1}: loss {loss:.4f}, held out {told['held_out_loss'][-1]:.4f}, "
                f"{told['wire_bytes'][-1]:,} bytes",
                file=sys.stderr,
            )
    if output is not None and settings.model is not None:
        assert isinstance(pipeline.module, Stage)
        save_stage(pipeline.module, settings.cuts, Path(settings.model), output)
    pipeline.group.gather(None)  # nobody ends before all have written
    return told | {"trace": _trace(settings, phases, len(samples), start).to_dict()}


def _epoch(
    pipeline: Pipeline, optimizer: torch.optim.Optimizer, settings: Settings, samples: Tensor, epoch: int
) -> tuple[Phase, float]:
    before, compute_s = pipeline.ledger.traffic, pipeline.ledger.busy_s.get("compute", 0.0)
    start_s, total = time.perf_counter(), 0.0
    for ids in settings.batches(epoch, len(samples)):
        optimizer.zero_grad()
        loss = pipeline.step(samples[ids, :-1], samples[ids, 1:], sample_ids=ids)
        pipeline.clip_gradients(settings.clip)
        optimizer.step()
        total += (loss or 0.0) * len(ids)
    sent = pipeline.ledger.traffic - before
    spent_s = pipeline.ledger.busy_s["compute"] - compute_s
    every = pipeline.group.gather([sent.to_dict(), spent_s, total])
    phase = Phase(
        name=FIRST if epoch == 0 else LATER,
        seconds=time.perf_counter() - start_s,
        busy_s={"compute": max(each[1] for each in every)},
        traffic=Traffic.total(Traffic.from_dict(each[0]) for each in every),
        counts={"samples": len(samples)},
    )
    return phase, every[-1][2] / len(samples)


def _held_out_loss(pipeline: Pipeline, held_out: Tensor, batch: int) -> float:
    total = 0.0
    for rows in held_out.split(batch):
        total += (pipeline.evaluate(rows[:, :-1], rows[:, 1:]) or 0.0) * len(rows)
    return float(pipeline.group.gather(total)[-1]) / len(held_out)


def _trace(settings: Settings, phases: list[Phase], num_samples: int, num_kept: int) -> Trace:
    joined = []
    for name in (FIRST, LATER):
        same = [each for each in phases if each.name == name]
        if same:
            joined.append(
                Phase(
                    name=name,
                    seconds=sum(each.seconds for each in same),
                    busy_s={"compute": sum(each.busy_s["compute"] for each in same)},
                    traffic=Traffic.total(each.traffic for each in same),
                    counts={"samples": num_samples * len(same)},
                )
            )
    return Trace(
        system="pipelining",
        title=f"{settings.stages} stages, {num_samples} samples, {settings.epochs} epochs",
        machine=platform.node(),
        phases=tuple(joined),
        notes=_notes(len(phases), num_kept),
    )


def _notes(num_trained: int, num_kept: int) -> tuple[str, ...]:
    notes = ["Bytes are counted; the links' seconds are not measured, since all stages ran on one machine."]
    if num_kept:
        notes.append(f"{num_kept} epochs were in the checkpoint; only {num_trained} were trained and timed.")
    return tuple(notes)


# --- checkpoints -----------------------------------------------------------------------------------------


def save(
    folder: Path,
    pipeline: Pipeline,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    epoch: int,
    told: dict[str, Any],
) -> None:
    """Write this stage's state after `epoch` epochs, whole or not at all. The one before is kept, since
    another rank may not have come so far; older ones are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    rank, size = pipeline.group.rank, pipeline.group.size
    record = {
        "settings": asdict(settings),
        "told": told,
        "pipeline": pipeline.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with open_atomically(_path(folder, epoch, rank, size)) as file:
        torch.save(record, file)
    _path(folder, epoch - 2, rank, size).unlink(missing_ok=True)


def check_folder(folder: Path, settings: Settings) -> None:
    """What `load_latest` would refuse, known before ranks are started.

    Raises:
        InputError: the checkpoints in `folder` are of other settings.
    """
    found = _found(folder)
    own = [epoch for epoch, _, stages in found if stages == settings.stages]
    if found and not own:
        _refuse_number(folder, found, settings.stages)
    for epoch, stage, stages in found:
        if own and (epoch, stages) == (max(own), settings.stages):
            path = _path(folder, epoch, stage, stages)
            settings.check_same(_loaded(path)["settings"], path)


def load_latest(
    folder: Path, pipeline: Pipeline, optimizer: torch.optim.Optimizer, settings: Settings
) -> tuple[int, dict[str, Any]]:
    """Load the last epoch that every stage has kept: its number, 0 for none, and what was told until then.

    Raises:
        InputError: it was trained with other settings.
    """
    rank, size = pipeline.group.rank, pipeline.group.size
    found = _found(folder)
    own = [epoch for epoch, stage, stages in found if (stage, stages) == (rank, size)]
    common = set.intersection(*(set(each) for each in pipeline.group.gather(own)))
    if not common:
        if {stages for _, _, stages in found} - {size}:
            _refuse_number(folder, found, size)
        return 0, {}
    path = _path(folder, max(common), rank, size)
    record = _loaded(path)
    settings.check_same(record["settings"], path)
    pipeline.load_state_dict(record["pipeline"])
    optimizer.load_state_dict(record["optimizer"])
    return max(common), record["told"]


def _path(folder: Path, epoch: int, rank: int, size: int) -> Path:
    return folder / f"epoch-{epoch:06d}.stage-{rank}-of-{size}.pt"


def _found(folder: Path) -> list[tuple[int, int, int]]:
    """Epoch, stage and number of stages of each file."""
    names = [_NAME.fullmatch(path.name) for path in folder.glob("epoch-*.pt")]
    return [(int(name[1]), int(name[2]), int(name[3])) for name in names if name]


def _refuse_number(folder: Path, found: list[tuple[int, int, int]], size: int) -> None:
    other = min(stages for _, _, stages in found if stages != size)
    raise InputError(
        f"{folder} has checkpoints of {other} stages; these are {size}. Use as many, or another folder to "
        "begin anew."
    )


def _loaded(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = torch.load(path, weights_only=True, mmap=True)
    except Exception as error:  # whatever a file that is none leads to
        raise InputError(f"{path} is no checkpoint that can be read. Remove it to begin anew.") from error
    return record


# --- a process a rank ------------------------------------------------------------------------------------


def run_rank(settings: Settings, checkpoint: Path | None, output: Path | None) -> dict[str, Any]:
    """Train as one of torchrun's ranks: what `train` returns."""
    torch.set_num_threads(1)  # stages share the machine's cores
    dist.init_process_group("gloo", timeout=timedelta(seconds=settings.patience_s))
    found = train(settings, checkpoint, output)
    dist.destroy_process_group()
    return found


def end_with_parent() -> None:
    """The kernel kills this process when the one that started it ends, however it does: ranks of a run that
    was killed must not go on writing beside those of the next. Only on Linux; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(arguments: list[str]) -> int:
    """Run as one rank that torchrun has started; rank 0 writes what it measured to the file `out`."""
    end_with_parent()
    told = json.loads(arguments[0])
    paths = {name: Path(told[name]) if told[name] else None for name in ("checkpoint", "output")}
    try:
        found = run_rank(Settings(**told["settings"]), **paths)
    except CapstanError as error:
        print(f"error: rank {os.environ.get('RANK')}: {error}", file=sys.stderr)
        return error.exit_code
    if os.environ.get("RANK") == "0":
        write_atomically(Path(told["out"]), json.dumps(found).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
