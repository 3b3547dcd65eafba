"""The command line: one file a verb. Here the rooms meet; everywhere else they do not know each other."""

import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from capstan.cli.allocate import allocate
from capstan.cli.demo import demo
from capstan.cli.evaluate import app as evaluate
from capstan.cli.federate import federate
from capstan.cli.generate import generate
from capstan.cli.merge import merge
from capstan.cli.partition import partition
from capstan.cli.probe import probe
from capstan.cli.recommend import app as recommend
from capstan.cli.relate import relate
from capstan.cli.serve import serve
from capstan.cli.shuffle import app as shuffle
from capstan.cli.train import train
from capstan.cli.train_pipeline import pipeline
from capstan.errors import CapstanError

__all__ = ["app", "main"]

app = typer.Typer(
    name="capstan",
    help="Run, train and judge big models on the hardware that you have. Every verb plans before it runs: "
    "--explain prints the plan and stops, and afterwards the measured figures stand beside it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_INTERRUPTED = 130
VERBS: dict[str, Callable[..., None]] = {
    "probe": probe,
    "generate": generate,
    "merge": merge,
    "serve": serve,
    "allocate": allocate,
    "relate": relate,
    "demo": demo,
}
for _name, _verb in VERBS.items():
    app.command(_name)(_verb)
app.add_typer(evaluate, name="evaluate")
app.add_typer(train, name="train")
app.add_typer(recommend, name="recommend")
app.add_typer(shuffle, name="shuffle")
app.add_typer(partition, name="partition")
app.add_typer(federate, name="federate")
train.command("pipeline")(pipeline)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"capstan {version('capstan-ml')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the verb."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for failure, 2 for wrong usage, 130 for Ctrl-C."""
    errors = Console(stderr=True, highlight=False)
    # OpenMP's threads spin while they wait, and where another program wants the same cores that slows small
    # steps twentyfold. Read when torch is loaded, which no verb has done yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(args=arguments)
    except CapstanError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return error.exit_code
    except SystemExit as done:
        if done.code == _INTERRUPTED:
            errors.print("Stopped. The same command goes on where it was.")
        return done.code if isinstance(done.code, int) else int(bool(done.code))
    return 0
