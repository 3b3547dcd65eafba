"""`capstan merge`: the outputs of a batch file's shards become one file."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

OutputsArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="OUTPUT", help="The outputs of `capstan generate --shard`, all of them, in any order."
    ),
]
InputOption = Annotated[Path, typer.Option("--input", help="The batch file that the shards are of.")]
TargetOption = Annotated[
    Path,
    typer.Option("--output", help="Where all answers go, in the order of the input's lines: all or nothing."),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output if there is one already.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, for programs.")
]


def merge(
    outputs: OutputsArgument,
    input_file: InputOption,
    target: TargetOption,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Put the outputs of a batch file's shards into one file.

    Every line of the input must be answered exactly once; if not, what is missing, double, foreign or torn is
    named by file and line, and nothing is written. Files may be larger than memory.

        capstan merge out-*.jsonl --input in.jsonl --output all.jsonl
    """
    # Imported here: torch, which the room of generation imports, takes seconds.
    from capstan.generation.batch import merge as batch_merge

    report = batch_merge.merge(outputs, input_file, target, overwrite=overwrite)
    if as_json:
        record = {"verb": "merge", "output": str(target), "num_outputs": len(outputs)} | asdict(report)
        typer.echo(json.dumps(record))
        return
    bad = f", {report.num_errors:,} bad lines" if report.num_errors else ""
    files = "1 file" if len(outputs) == 1 else f"{len(outputs):,} files"
    typer.echo(f"{target}: {report.num_answered:,} answered{bad}, from {files}.")
