"""`capstan train pipeline`: a language model in stages, one a process, whose messages are compressed."""

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
    from capstan.pipelining.settings import Settings
    from capstan.plans import Plan

DataOption = Annotated[
    Path, typer.Option("--data", help="A text, or JSON lines (.jsonl) with a `text` each.")
]
ModelOption = Annotated[
    Path | None,
    typer.Option(
        help="A folder with a causal LM in Hugging Face format; without it a small decoder on bytes."
    ),
]
OutputOption = Annotated[
    Path | None, typer.Option(help="With --model: a folder for the trained model, in the same format.")
]
EvalOption = Annotated[
    Path | None, typer.Option("--eval", help="Held-out text; without it the last tenth of --data is.")
]
StagesOption = Annotated[
    int | None, typer.Option(help="Stages, each a process on this machine (2), or under torchrun a rank.")
]
ForwardOption = Annotated[int, typer.Option(help="Bits of activations, 1 to 8; 0 for full precision.")]
BackwardOption = Annotated[int, typer.Option(help="Bits of gradients, 1 to 8; 0 for full precision.")]
GroupOption = Annotated[int, typer.Option(min=1, help="Values that share one scale.")]
DirectOption = Annotated[bool, typer.Option("--direct", help="Send activations, not their changes.")]
SymmetricOption = Annotated[
    bool, typer.Option("--symmetric", help="Grids with as many levels below 0 as above.")
]
MidriseOption = Annotated[
    bool, typer.Option("--midrise", help="Grids with as many levels below 0 as above, and none at 0.")
]
StochasticOption = Annotated[bool, typer.Option("--stochastic", help="Round without bias.")]
ScheduleOption = Annotated[str, typer.Option(help="1f1b or gpipe.")]
PartsOption = Annotated[int, typer.Option("--micro-batches", help="Parts of a batch.")]
BatchOption = Annotated[int, typer.Option(help="Samples a step.")]
SequenceOption = Annotated[int, typer.Option(help="Tokens a sample.")]
DimOption = Annotated[int | None, typer.Option(help="Hidden size of the decoder (64).")]
LayersOption = Annotated[int | None, typer.Option(help="Layers of the decoder (4).")]
HeadsOption = Annotated[int | None, typer.Option(help="Attention heads of the decoder (4).")]
RateOption = Annotated[
    float | None, typer.Option(help="Learning rate of AdamW (5e-5 with --model, 2e-3 without).")
]
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
    model: ModelOption = None,
    output: OutputOption = None,
    held_out: EvalOption = None,
    stages: StagesOption = None,
    forward_bits: ForwardOption = 3,
    backward_bits: BackwardOption = 6,
    group_size: GroupOption = 64,
    direct: DirectOption = False,
    symmetric: SymmetricOption = False,
    midrise: MidriseOption = False,
    stochastic: StochasticOption = False,
    schedule: ScheduleOption = "1f1b",
    micro_batches: PartsOption = 4,
    batch: BatchOption = 16,
    sequence: SequenceOption = 64,
    dim: DimOption = None,
    layers: LayersOption = None,
    heads: HeadsOption = None,
    learning_rate: RateOption = None,
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
    """Train a language model on a text, in stages whose messages are compressed.

    capstan train pipeline --model models/llama --data book.txt --output models/tuned --stages 4
    """
    # Imported here: torch takes seconds.
    from capstan.pipelining.settings import Settings

    if bandwidth_mbit <= 0 or latency_ms < 0:
        raise UsageError(
            f"A link has a bandwidth above 0 and a latency of 0 or more, found {bandwidth_mbit} Mbit/s and "
            f"{latency_ms} ms."
        )
    if (model is None) != (output is None) and not explain:
        raise UsageError("--model is what is fine-tuned and --output where the result goes: give both.")
    shape = {
        name: each for name, each in (("dim", dim), ("layers", layers), ("heads", heads)) if each is not None
    }
    if model is not None and shape:
        raise UsageError(f"--model has its own {', '.join(shape)}. Leave the option out.")
    settings = Settings(
        data=str(data),
        held_out=str(held_out) if held_out else None,
        model=str(model) if model else None,
        stages=_stages(stages),
        forward_bits=forward_bits or None,
        backward_bits=backward_bits or None,
        group_size=group_size,
        direct=direct,
        symmetric=symmetric,
        midrise=midrise,
        stochastic=stochastic,
        schedule=schedule,
        micro_batches=micro_batches,
        batch=batch,
        sequence=sequence,
        **shape,
        learning_rate=learning_rate if learning_rate is not None else 2e-3 if model is None else 5e-5,
        clip=clip,
        epochs=epochs,
        seed=seed,
        patience_s=patience_s,
    )
    _check(settings, checkpoint, output)
    # Under torchrun every rank has this command line, and the first one speaks.
    speaks = not _is_rank() or os.environ["RANK"] == "0"
    plan = _plan(settings, bandwidth_mbit, latency_ms) if speaks else None
    found = None if explain else _run(settings, checkpoint, output)
    if plan is not None:
        _print(plan, found, as_json)


def _is_rank() -> bool:
    """Whether torchrun has started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def _stages(wanted: int | None) -> int:
    if not _is_rank():
        return 2 if wanted is None else wanted
    ranks = int(os.environ["WORLD_SIZE"])
    if wanted not in (None, ranks):
        raise UsageError(f"torchrun has started {ranks} ranks, and --stages is {wanted}. Leave --stages out.")
    return ranks


def _check(settings: "Settings", checkpoint: Path | None, output: Path | None) -> None:
    """All that can be known to fail before anything is trained."""
    from capstan.models import refuse_other_weights
    from capstan.pipelining.training import check_folder

    for folder in (checkpoint, output):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file. Name a folder.")
    settings.samples()
    if output is not None and settings.model is not None:
        refuse_other_weights(settings.stages, Path(settings.model), output)
    if checkpoint is not None:
        check_folder(checkpoint, settings)


def _plan(settings: "Settings", bandwidth_mbit: float, latency_ms: float) -> "Plan":
    from capstan.pipelining.planner import Links, measured_compute_s, plan_training

    links = Links(
        bandwidth_bytes_per_s=bandwidth_mbit * 1e6 / 8,
        latency_s=latency_ms / 1e3,
        compute_s=measured_compute_s(settings),
    )
    return plan_training(settings, len(settings.samples()[0]), links)


def _print(plan: "Plan", found: dict[str, Any] | None, as_json: bool) -> None:
    from capstan.plans import Trace, compare
    from capstan.plans import explain as explained

    if as_json:
        typer.echo(json.dumps({"verb": "train pipeline", "plan": plan.to_dict()} | (found or {})))
    else:
        typer.echo(explained(plan) if found is None else compare(plan, Trace.from_dict(found["trace"])))


def _run(settings: "Settings", checkpoint: Path | None, output: Path | None) -> dict[str, Any]:
    """Be one of torchrun's ranks, or start a process for each stage; what the first one has measured."""
    from capstan.pipelining.training import end_with_parent, run_rank

    if _is_rank():
        return run_rank(settings, checkpoint, output)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        told = {
            "settings": asdict(settings),
            "checkpoint": str(checkpoint) if checkpoint else None,
            "output": str(output) if output else None,
            "out": str(out),
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={settings.stages}", "-m", "capstan.pipelining.training"]
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        done = subprocess.run(
            [*command, json.dumps(told)],
            env=environment,
            stdout=2,  # what ranks say goes to standard error
            check=False,
            preexec_fn=end_with_parent,
        )
        if done.returncode != 0:
            raise typer.Exit(done.returncode)
        return dict(json.loads(out.read_bytes()))
