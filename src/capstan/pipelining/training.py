"""One rank of `capstan train pipeline`: trains, keeps checkpoints, and tells what it measured.

python -m torch.distributed.run --nproc-per-node=4 -m capstan.pipelining.training '{"settings": …}'
"""

import json
import platform
import re
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
from capstan.pipelining.decoder import token_loss
from capstan.pipelining.pipeline import Pipeline
from capstan.pipelining.planner import FIRST, LATER
from capstan.pipelining.settings import Settings
from capstan.plans import Phase, Trace, Traffic
from capstan.storage import open_atomically, write_atomically

_NAME = re.compile(r"epoch-(\d{6})\.stage-(\d+)-of-(\d+)\.pt")


def train(settings: Settings, folder: Path | None = None) -> dict[str, Any]:
    """Train this rank's stage, from the last checkpoint in `folder` if there is one.

    Returns:
        `loss`, `held_out_loss` and `wire_bytes` for each epoch, and a `trace`; the same on every rank.
    """
    samples, held_out = settings.samples()
    pipeline = Pipeline(
        settings.model(),
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
    with open_atomically(folder / f"epoch-{epoch:06d}.stage-{rank}-of-{size}.pt") as file:
        torch.save(record, file)
    (folder / f"epoch-{epoch - 2:06d}.stage-{rank}-of-{size}.pt").unlink(missing_ok=True)


def load_latest(
    folder: Path, pipeline: Pipeline, optimizer: torch.optim.Optimizer, settings: Settings
) -> tuple[int, dict[str, Any]]:
    """Load the last epoch that every stage has kept: its number, 0 for none, and what was told until then.

    Raises:
        InputError: it was trained with other settings.
    """
    rank, size = pipeline.group.rank, pipeline.group.size
    names = [_NAME.fullmatch(path.name) for path in folder.glob("epoch-*.pt")]
    found = [tuple(map(int, name.groups())) for name in names if name]
    own = [epoch for epoch, stage, stages in found if (stage, stages) == (rank, size)]
    common = set.intersection(*(set(each) for each in pipeline.group.gather(own)))
    if not common:
        if others := sorted({stages for _, _, stages in found} - {size}):
            raise InputError(
                f"{folder} has checkpoints of {others[0]} stages; these are {size}. Use as many, or another "
                "folder to begin anew."
            )
        return 0, {}
    path = folder / f"epoch-{max(common):06d}.stage-{rank}-of-{size}.pt"
    record = torch.load(path, weights_only=True)
    settings.check_same(record["settings"], path)
    pipeline.load_state_dict(record["pipeline"])
    optimizer.load_state_dict(record["optimizer"])
    return max(common), record["told"]


def main(arguments: list[str]) -> int:
    """Run as one rank that torchrun has started; rank 0 writes what it measured to the file `out`."""
    told = json.loads(arguments[0])
    settings = Settings(**told["settings"])
    torch.set_num_threads(1)  # stages share the machine's cores
    dist.init_process_group("gloo", timeout=timedelta(seconds=settings.patience_s))
    try:
        found = train(settings, Path(told["checkpoint"]) if told["checkpoint"] else None)
    except CapstanError as error:
        print(f"error: rank {dist.get_rank()}: {error}", file=sys.stderr)
        return error.exit_code
    if dist.get_rank() == 0:
        write_atomically(Path(told["out"]), json.dumps(found).encode())
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
