"""`capstan train pipeline`: a model in stages, one a process, whose messages are compressed."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capstan.errors import UsageError

if TYPE_CHECKING:
    from capstan.plans import Plan

DataOption = Annotated[Path, typer.Option("--data", help="A text file; its bytes are the tokens.")]
StagesOption = Annotated[int, typer.Option(help="Stages, each a process on this machine.")]
ForwardOption = Annotated[int, typer.Option(help="Bits of activations, 1 to 8; 0 for full precision.")]
BackwardOption = Annotated[int, typer.Option(help="Bits of gradients, 1 to 8; 0 for full precision.")]
GroupOption = Annotated[int, typer.Option(min=1, help="Values that share one scale.")]
DirectOption = Annotated[bool, typer.Option("--direct", help="Send activations, not their changes.")]
SymmetricOption = Annotated[
    bool, typer.Option("--symmetric", help="Grids with as many levels below 0 as above.")
]
StochasticOption = Annotated[bool, typer.Option("--stochastic", help="Round without bias.")]
ScheduleOption = Annotated[str, typer.Option(help="1f1b or gpipe.")]
PartsOption = Annotated[int, typer.Option("--micro-batches", help="Parts of a batch.")]
BatchOption = Annotated[int, typer.Option(help="Samples a step.")]
SequenceOption = Annotated[int, typer.Option(help="Tokens a sample.")]
DimOption = Annotated[int, typer.Option(help="Hidden size of the decoder.")]
LayersOption = Annotated[int, typer.Option(help="Layers of the decoder.")]
HeadsOption = Annotated[int, typer.Option(help="Attention heads.")]
RateOption = Annotated[float, typer.Option(help="Learning rate of AdamW.")]
ClipOption = Annotated[float, typer.Option(help="Largest norm of all stages' gradients.")]
EpochsOption = Annotated[int, typer.Option(help="Passes over the text.")]
SeedOption = Annotated[int, typer.Option(help="Of weights and order.")]
PatienceOption = Annotated[float, typer.Option(help="Seconds to wait for another stage.")]
CheckpointOption = Annotated[
    Path | None, typer.Option(help="A folder for checkpoints; the same command goes on from the last one.")
]
BandwidthOption = Annotated[float, typer.Option(help="For the plan: Mbit/s between stages, each way.")]
LatencyOption = Annotated[float, typer.Option(help="For the plan: one-way latency in milliseconds.")]
ExplainOption = Annotated[bool, typer.Option("--explain", help="Print the plan and stop.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def pipeline(
    data: DataOption,
    stages: StagesOption = 2,
    forward_bits: ForwardOption = 3,
    backward_bits: BackwardOption = 6,
    group_size: GroupOption = 64,
    direct: DirectOption = False,
    symmetric: SymmetricOption = False,
    stochastic: StochasticOption = False,
    schedule: ScheduleOption = "1f1b",
    micro_batches: PartsOption = 4,
    batch: BatchOption = 16,
    sequence: SequenceOption = 64,
    dim: DimOption = 64,
    layers: LayersOption = 4,
    heads: HeadsOption = 4,
    learning_rate: RateOption = 2e-3,
    clip: ClipOption = 1.0,
    epochs: EpochsOption = 10,
    seed: SeedOption = 0,
    patience_s: PatienceOption = 600.0,
    checkpoint: CheckpointOption = None,
    bandwidth_mbit: BandwidthOption = 1000.0,
    latency_ms: LatencyOption = 1.0,
    explain: ExplainOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a small decoder on a text file, in stages whose messages are compressed.

    capstan train pipeline --data book.txt --stages 4 --forward-bits 3 --backward-bits 6
    """
    # Imported here: torch takes seconds.
    from capstan.pipelining.planner import Links, measured_compute_s, plan_training
    from capstan.pipelining.settings import Settings
    from capstan.plans import Trace, compare
    from capstan.plans import explain as explained

    if bandwidth_mbit <= 0 or latency_ms < 0:
        raise UsageError(
            f"A link has a bandwidth above 0 and a latency of 0 or more, found {bandwidth_mbit} Mbit/s and "
            f"{latency_ms} ms."
        )
    settings = Settings(
        data=str(data),
        stages=stages,
        forward_bits=forward_bits or None,
        backward_bits=backward_bits or None,
        group_size=group_size,
        direct=direct,
        symmetric=symmetric,
        stochastic=stochastic,
        schedule=schedule,
        micro_batches=micro_batches,
        batch=batch,
        sequence=sequence,
        dim=dim,
        layers=layers,
        heads=heads,
        learning_rate=learning_rate,
        clip=clip,
        epochs=epochs,
        seed=seed,
        patience_s=patience_s,
    )
    num_samples = len(settings.samples()[0])
    links = Links(
        bandwidth_bytes_per_s=bandwidth_mbit * 1e6 / 8,
        latency_s=latency_ms / 1e3,
        compute_s=measured_compute_s(settings),
    )
    plan = plan_training(settings, num_samples, links)
    if explain:
        typer.echo(json.dumps(_told(plan)) if as_json else explained(plan))
        return
    found = _run(asdict(settings), checkpoint)
    if as_json:
        typer.echo(json.dumps(_told(plan) | found))
        return
    typer.echo(compare(plan, Trace.from_dict(found["trace"])))


def _told(plan: "Plan") -> dict[str, Any]:
    return {"verb": "train pipeline", "plan": plan.to_dict()}


def _run(settings: dict[str, Any], checkpoint: Path | None) -> dict[str, Any]:
    """Start a process for each stage, and read what the first one has measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        told = {
            "settings": settings,
            "checkpoint": str(checkpoint) if checkpoint else None,
            "out": str(out),
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={settings['stages']}", "-m", "capstan.pipelining.training"]
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        done = subprocess.run(
            [*command, json.dumps(told)],
            env=environment,
            stdout=2,
            check=False,  # what ranks say goes to standard error
        )
        if done.returncode != 0:
            raise typer.Exit(done.returncode)
        return dict(json.loads(out.read_bytes()))
