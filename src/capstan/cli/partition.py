"""`capstan partition`: what to lay data out by, from a history of runs; the layouts; the proof."""

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capstan.errors import InputError, UsageError
from capstan.plans import bytes_text, seconds_text

if TYPE_CHECKING:
    from capstan.partitioning.tables import Table

partition = typer.Typer(
    help="Store data so that the joins and groups that will run need no shuffle.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)

HistoryArgument = Annotated[
    Path, typer.Argument(metavar="HISTORY.db", help="Runs kept by capstan.partitioning.record.")
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object on standard output, everything else on standard error."
    ),
]


@partition.callback()
def _partition() -> None:
    """Store data so that the joins and groups that will run need no shuffle."""


@partition.command("advise")
def advise(
    history: HistoryArgument,
    advisor: Annotated[
        str,
        typer.Option(help="cost: weigh all layouts; rules: the costliest joins; frequent: frequent keys."),
    ] = "cost",
    machine: Annotated[
        Path | None,
        typer.Option(
            help="A machine's profile, from capstan probe: rates for histories without timed shuffles."
        ),
    ] = None,
    expected_runs: Annotated[
        int, typer.Option(help="How often the recorded work will run again; writing is spread over it.")
    ] = 10,
    as_json: JsonOption = False,
) -> None:
    """Say which tables to lay out by which key, or none, and what to expect.

    capstan partition advise runs.db --json
    """
    from capstan.hardware import Machine
    from capstan.partitioning.advice import advise as advise_on
    from capstan.partitioning.cost import Rates

    rates = Rates.of_machine(Machine.from_json(_text(machine))) if machine is not None else None
    advice = advise_on(history, advisor=advisor, rates=rates, expected_runs=expected_runs)
    if as_json:
        _print({"verb": "partition advise", **advice.to_dict()})
    else:
        typer.echo(advice.explain(), nl=False)


@partition.command("apply")
def apply(
    source: Annotated[Path, typer.Argument(metavar="TABLE", help="A Parquet file or a folder of them.")],
    key: Annotated[str, typer.Option(help="A column, or MODULE:FUNCTION, a function of a row as a dict.")],
    into: Annotated[Path, typer.Option(help="The folder of the laid-out copy; the source stays as it is.")],
    buckets: Annotated[int, typer.Option(help="How many; equal for tables that are joined.")] = 16,
    name: Annotated[str | None, typer.Option(help="The table's name; by default the file's.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a table in buckets by a key, and switch to it when it is whole."""
    from capstan.partitioning.applying import apply as apply_layout
    from capstan.partitioning.reading import read_key
    from capstan.partitioning.tables import open_table

    table = apply_layout(open_table(source, name=name), read_key(_function(key)), into, num_buckets=buckets)
    _tell_table(table, "partition apply", as_json=as_json)


@partition.command("verify")
def verify(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Tables that apply laid out.")],
    sql: Annotated[
        str | None, typer.Option("--query", help="SQL over the tables' names, run by DuckDB.")
    ] = None,
    job: Annotated[
        str | None, typer.Option(help="MODULE:FUNCTION, which takes tables by name and gives results.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each; medians count.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Run the same work on the sources and on the layouts: results, seconds, shuffled bytes."""
    from capstan.partitioning.tables import open_table
    from capstan.partitioning.verifying import query
    from capstan.partitioning.verifying import verify as verify_work

    if (sql is None) == (job is None):
        raise UsageError("Give either --query SQL or --job MODULE:FUNCTION.")
    work = query(sql) if sql is not None else _loaded(str(job))
    found = verify_work(work, [open_table(folder) for folder in folders], repeats=repeats)
    told = found.to_dict()
    if as_json:
        _print({"verb": "partition verify", **told})
    else:
        for way in ("before", "after"):
            shuffled = bytes_text(told[way]["shuffled_bytes"])
            typer.echo(f"{way:7} {seconds_text(told[way]['seconds'])}, {shuffled} shuffled")
        typer.echo(f"{found.speedup:.2f} x; results are {'equal' if found.is_same else 'DIFFERENT'}")
    if not found.is_same:
        raise InputError("Results differ between the sources and the layouts. Roll the layouts back.")


@partition.command("rollback")
def rollback(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A table that apply laid out.")],
    as_json: JsonOption = False,
) -> None:
    """Switch a table back to the layout before, or to its source."""
    from capstan.partitioning.applying import rollback as roll_back

    _tell_table(roll_back(folder), "partition rollback", as_json=as_json)


def _tell_table(table: "Table", verb: str, *, as_json: bool) -> None:
    layout = table.layout
    if as_json:
        _print({"verb": verb, "table": table.name, "layout": asdict(layout) if layout else None})
    elif layout is None:
        typer.echo(f"{table.name} is read from {table.source}.")
    else:
        skew = f"largest bucket {layout.skew:.1f} x the mean"
        typer.echo(f"{table.name} lies by {layout.key_text} in {layout.num_buckets} buckets; {skew}.")


def _function(key: str) -> Any:
    return _loaded(key) if ":" in key else key


def _loaded(name: str) -> Any:
    """MODULE:FUNCTION, the module looked for in the working folder too, as python -m does."""
    module, _, function = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{name!r} is not there: {error}. Write MODULE:FUNCTION.") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}. Write it with: capstan probe --json.") from error


def _print(told: dict[str, Any]) -> None:
    typer.echo(json.dumps(told, indent=2))
