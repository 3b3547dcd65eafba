"""`capstan recommend`: train a recommender with embedding tables, and take its rows out."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from capstan.cli.progress import show_progress
from capstan.errors import require_extra

if TYPE_CHECKING:
    from capstan.recommendation.training import Trained

app = typer.Typer(
    help="Train recommenders whose embeddings are large: rows late, the dense network in step.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

DataOption = Annotated[
    Path, typer.Option("--data", help="Labelled samples, a Parquet file, in training order.")
]
ConfigOption = Annotated[
    Path,
    typer.Option("--config", help="YAML: label, dense columns, slots, network; see docs/recommendation.md."),
]
TestOption = Annotated[
    Path | None, typer.Option("--test", help="A Parquet file to score afterwards: its AUC.")
]
EpochsOption = Annotated[int, typer.Option(min=1, help="How often every sample is trained on.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Samples of a step.")]
ModeOption = Annotated[
    str,
    typer.Option(
        help="sync: rows in step. hybrid: rows late by exactly --staleness. async: by at most that."
    ),
]
StalenessOption = Annotated[int, typer.Option(min=1, help="Batches in flight at most; 1 is in step.")]
SeedOption = Annotated[int, typer.Option(help="Rows and network start from this.")]
MemoryOption = Annotated[
    str | None, typer.Option(help="Memory granted to the tables, as 8GiB; by default what is free.")
]
DiskOption = Annotated[
    Path | None, typer.Option("--disk", help="A folder on whose disk the rows rest, mapped into memory.")
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", help="Keeps the recommender in this folder after each epoch; the same command "
                 "goes on there."),
]  # fmt: skip
ExplainOption = Annotated[bool, typer.Option("--explain", help="Print what training would take, and stop.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


@app.callback()
def _recommend() -> None:
    """Train recommenders whose embeddings are large."""


@app.command("train")
def train(
    data: DataOption,
    config: ConfigOption,
    test: TestOption = None,
    epochs: EpochsOption = 1,
    batch_size: BatchOption = 4096,
    mode: ModeOption = "sync",
    staleness: StalenessOption = 1,
    seed: SeedOption = 0,
    memory: MemoryOption = None,
    disk: DiskOption = None,
    output: OutputOption = None,
    explain: ExplainOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train on a Parquet file, and say what was predicted and what it took.

    capstan recommend train --data clicks.parquet --config table.yaml --test later.parquet
    """
    require_extra("recommendation", "torch", "pyarrow")
    # Imported here: torch takes seconds.
    from capstan.errors import unknown_name
    from capstan.hardware import this_machine
    from capstan.hardware.free_memory import free_host_memory
    from capstan.plans import compare, parse_bytes
    from capstan.plans import explain as explain_plan
    from capstan.recommendation.hybrid_embedding import MODES
    from capstan.recommendation.training import Training
    from capstan.recommendation.training_config import read_config

    if mode not in MODES:
        raise unknown_name("mode", mode, MODES)
    training = Training(
        config=read_config(config),
        data=data,
        machine=this_machine(device="cpu"),
        test=test,
        epochs=epochs,
        batch_size=batch_size,
        mode=mode,
        staleness=staleness,
        seed=seed,
        memory_bytes=parse_bytes(memory) if memory else free_host_memory().value,
        folder=disk,
        output=output,
    )
    if explain:
        plan = training.plan()
        shown = {"verb": "recommend", "plan": plan.to_dict(), "trace": None}
        typer.echo(json.dumps(shown) if as_json else explain_plan(plan))
        return
    with show_progress("training", Console(stderr=True, highlight=False)) as report:
        trained = training.run(report)
    if as_json:
        typer.echo(json.dumps(_shown(trained)))
        return
    typer.echo(compare(trained.plan, trained.trace))
    auc = "" if trained.auc is None else f"AUC {trained.auc:.4f} · "
    typer.echo(f"{auc}{trained.samples_per_s:,.0f} samples/s")


def _shown(trained: "Trained") -> dict[str, object]:
    return {
        "verb": "recommend",
        "plan": trained.plan.to_dict(),
        "trace": trained.trace.to_dict(),
        "auc": trained.auc,
        "samples_per_s": trained.samples_per_s,
        "staleness": trained.staleness._asdict(),
        "losses": list(trained.losses),
        "tables": {slot: counts._asdict() for slot, counts in trained.tables.items()},
    }


@app.command("export")
def export(
    recommender: Annotated[Path, typer.Option("--from", help="The recommender.pt of train's --output.")],
    output: Annotated[Path, typer.Option("--output", help="A folder; each slot gives SLOT.parquet there.")],
    as_json: JsonOption = False,
) -> None:
    """Write the embeddings of a trained recommender as Parquet: columns id (uint64) and embedding.

    capstan recommend export --from run/recommender.pt --output rows
    """
    require_extra("recommendation", "torch", "pyarrow")
    from capstan.recommendation.recommender import export_tables

    rows = export_tables(recommender, output)
    if as_json:
        typer.echo(json.dumps({"verb": "recommend", "plan": None, "trace": None, "rows": rows}))
        return
    for slot, count in rows.items():
        typer.echo(f"{output / slot}.parquet: {count:,} rows")
