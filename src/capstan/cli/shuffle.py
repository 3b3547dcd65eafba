"""`capstan shuffle`: train on data as they are stored, and what their order does to training."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from capstan.cli.progress import show_progress
from capstan.errors import UsageError

if TYPE_CHECKING:
    from capstan.shuffling import Clustering, FileBlocks, Trained

app = typer.Typer(
    help="Train on sorted or clustered data in an order as good as a full shuffle, at sequential speed.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

SourceArgument = Annotated[
    str, typer.Argument(help="A file or URL: .parquet, .arrow, .npy, .npz, .jsonl or .libsvm.")
]
LabelOption = Annotated[str, typer.Option("--label", help="The column to predict.")]
FeaturesOption = Annotated[
    str | None, typer.Option("--features", help="Columns a,b,c; by default every other numeric column.")
]
RowsOption = Annotated[
    int | None,
    typer.Option("--rows-per-block", min=1, help="Rows of a block, where the file does not say; it joins "
                 "smaller row groups of Parquet. Default: a 500th of the rows."),
]  # fmt: skip
BufferOption = Annotated[
    str, typer.Option("--buffer", help="What is shuffled together: 0.1 or 10% of the blocks, or 64MiB.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, all else on standard error.")
]


@app.command("train")
def train(
    source: SourceArgument,
    label: LabelOption,
    model: Annotated[str, typer.Option(help="linear, logistic, svm or softmax.")] = "logistic",
    strategy: Annotated[
        str, typer.Option(help="corgipile, full, none, block, window or reservoir.")
    ] = "corgipile",
    buffer: BufferOption = "0.1",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the rows.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another order.")] = 0,
    test: Annotated[str | None, typer.Option(help="A file of rows to score the model on.")] = None,
    features: FeaturesOption = None,
    rows_per_block: RowsOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 16,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate; default 0.2, of linear 0.5/(features + 1).")
    ] = None,
    lr_decay: Annotated[float, typer.Option(help="The learning rate's factor from epoch to epoch.")] = 0.95,
    averages: Annotated[
        bool, typer.Option("--average/--last", help="Judge the average of late weights, or the last ones.")
    ] = True,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Where the state and the model are kept; by default the cache folder, until done."),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print the plan and stop.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a linear model by mini-batch SGD. Killed, the same command goes on and gives the same model.

    capstan shuffle train sorted.parquet --label income --model logistic --test test.parquet
    """
    from capstan.hardware.cache_folder import cache_folder
    from capstan.plans import compare
    from capstan.plans import explain as explain_plan
    from capstan.shuffling import Sample, Training, measure_rates, plan_training
    from capstan.shuffling import train as carry_out

    names = _names(features)
    rows, chosen = _opened(source, label, names, rows_per_block)
    tests = _opened(test, label, chosen, rows_per_block)[0] if test else None
    sample = Sample(rows)
    training = Training(
        label=label,
        model=model,
        strategy=strategy,
        features=chosen,
        buffer_blocks=_buffer_blocks(buffer, rows, sample.row_bytes),
        epochs=epochs,
        seed=seed,
        batch_size=batch_size,
        lr=lr,
        lr_decay=lr_decay,
        averages=averages,
    )
    plan = plan_training(rows, training, measure_rates(sample, training), test=tests)
    if explain:
        told = {"verb": "shuffle train", "plan": plan.to_dict(), "trace": None}
        typer.echo(json.dumps(told) if as_json else explain_plan(plan), nl=as_json)
        return
    run = training.run_name(rows, tests)
    place = checkpoint or cache_folder() / "shuffle-train" / f"{run[:32]}.npz"
    errors = Console(stderr=True, highlight=False)
    steps = training.share(rows.sizes, 0).num_steps
    with show_progress(f"{model}, {strategy}", errors) as report:

        def on_step(epoch: int, step: int) -> None:
            if step % 64 == 0:
                report((epoch * steps + step) / (epochs * steps), f"epoch {epoch + 1} of {epochs}")

        done = carry_out(rows, training, test=tests, checkpoint=place, on_step=on_step)
    if checkpoint is None:
        place.unlink(missing_ok=True)
    typer.echo(compare(plan, done.trace), nl=False, err=as_json)
    if as_json:
        typer.echo(json.dumps(_told(plan, done)))
    else:
        typer.echo(", ".join(f"{name} {value:.4f}" for name, value in done.score.items()))


def _told(plan: Any, done: "Trained") -> dict[str, Any]:
    epochs = done.trace.phase("epochs")
    rate = epochs.counts["rows"] / epochs.seconds if epochs and epochs.seconds else None
    return {
        "verb": "shuffle train",
        "plan": plan.to_dict(),
        "trace": done.trace.to_dict(),
        "accuracy": done.score.get("accuracy"),
        "score": done.score,
        "rows_per_s": rate,
        "epochs": [report.to_dict() for report in done.reports],
        "model": {
            "kind": done.model.kind,
            "weights": done.model.weights.tolist(),
            "examples": done.examples.to_dict(),
        },
    }


@app.command("doctor")
def doctor(
    source: SourceArgument,
    label: LabelOption,
    features: FeaturesOption = None,
    buffer: BufferOption = "0.1",
    blocks: Annotated[int, typer.Option(min=2, help="Blocks that are read.")] = 32,
    rows_per_block: RowsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read a few blocks and say how clustered the rows are, which buffer to take, and what an epoch takes."""
    from capstan.plans import explain as explain_plan
    from capstan.shuffling import Sample, look_at, plan_epoch

    rows, chosen = _opened(source, label, _names(features), rows_per_block)
    sample = Sample(rows, blocks)
    filled = sum(size > 0 for size in rows.sizes)
    found = look_at(sample, label=label, num_rows=sum(rows.sizes), num_blocks=filled, features=chosen)
    plan = plan_epoch(rows, found, sample)
    asked = min(_buffer_blocks(buffer, rows, sample.row_bytes), filled)
    buffers = sorted(
        {1, asked, found.advised_buffer, *(max(1, round(filled * s)) for s in (0.01, 0.02, 0.05, 0.1))}
    )
    worth = {count: found.effective_rows(count) for count in buffers}
    if as_json:
        told = {
            "verb": "shuffle doctor",
            "plan": plan.to_dict(),
            "trace": None,
            "h_d": found.h_d,
            "rows_per_block": found.rows_per_block,
            "num_blocks": found.num_blocks,
            "blocks_read": found.blocks_read,
            "verdict": found.verdict,
            "effective_rows": {str(count): value for count, value in worth.items()},
            "advised_buffer_blocks": found.advised_buffer,
            "advised_buffer": found.advised_buffer / filled,
            "asked_buffer_blocks": asked,
            "advice": _advice(found, asked),
        }
        typer.echo(json.dumps(told))
        return
    typer.echo(
        f"{found.verdict}: h_D {found.h_d:.1f}, which would be 1 for shuffled rows and up to "
        f"{found.rows_per_block:.0f} for blocks of equal rows. {found.blocks_read} of {filled:,} read."
    )
    for count, value in worth.items():
        typer.echo(f"  a buffer of {count:,} blocks ({count / filled:.1%}) is worth {value:,.0f} random rows")
    typer.echo(_advice(found, asked))
    typer.echo(explain_plan(plan), nl=False)


def _advice(found: "Clustering", asked: int) -> str:
    from capstan.shuffling.clustering import GOOD, POOR

    worth, advised = found.effective_rows(asked), found.advised_buffer
    share = advised / found.num_blocks
    if worth >= GOOD or asked == found.num_blocks:
        return f"A buffer of {asked:,} blocks is enough; {advised:,} ({share:.1%}) would be."
    words = "too small" if worth < POOR else "small"
    return (
        f"A buffer of {asked:,} blocks is {words}: take {advised:,} blocks (--buffer {share:.3f}), or write "
        "the file in smaller blocks."
    )


def _names(features: str | None) -> list[str] | None:
    return [name.strip() for name in features.split(",") if name.strip()] if features is not None else None


def _opened(
    path: str, label: str, features: Any, rows_per_block: int | None
) -> tuple["FileBlocks", tuple[str, ...]]:
    """The file with the columns that are used only, and the features."""
    from capstan.shuffling import choose_columns, open_source

    every = open_source(path, rows_per_block=rows_per_block)
    first = next(block for block in range(every.num_blocks) if every.num_rows(block))
    if features is not None:
        wanted = [name for name in every.columns if name in {label, *features}]
        every = open_source(path, rows_per_block=rows_per_block, columns=wanted)
    chosen, _ = choose_columns(every.read(first), label=label, features=features)
    used = [label, *chosen]
    return open_source(path, rows_per_block=rows_per_block, columns=used), chosen


def _buffer_blocks(told: str, source: "FileBlocks", row_bytes: float) -> int:
    """Blocks of a buffer that is given as a share of them or in bytes."""
    from capstan.plans import parse_bytes

    text = told.strip()
    is_percent = text.endswith("%")
    try:
        share = float(text.removesuffix("%")) / (100 if is_percent else 1)
    except ValueError:
        size = parse_bytes(text)
        return max(1, min(source.num_blocks, int(size / (row_bytes * max(source.sizes)))))
    if not 0 < share <= 1:
        raise UsageError(
            f"A buffer is a share of the blocks above 0 and up to 1, or bytes as 64MiB; not {told}."
        )
    return max(1, round(share * source.num_blocks))
