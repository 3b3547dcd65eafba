"""`capstan partition`: what to lay data out by, from a history of runs; the layouts; the proof."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from capstan.errors import InputError

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


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}. Write it with: capstan probe --json.") from error


def _print(told: dict[str, Any]) -> None:
    typer.echo(json.dumps(told, indent=2))
