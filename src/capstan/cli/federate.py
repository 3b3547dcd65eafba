"""`capstan federate`: what a network cut sends, and training over one, in one process or many."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from capstan.cli.federate_sessions import join, serve, serve_job, tell_epoch

if TYPE_CHECKING:
    from capstan.plans import Plan

federate = typer.Typer(
    help="Train a network cut between devices and a server.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)

WidthOption = Annotated[int, typer.Option("--cut-width", min=1, help="Elements a sample at the cut.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Samples of a device in an iteration.")]
KeepOption = Annotated[float, typer.Option(help="The share of activations that is sent, as 0.1.")]
ParametersOption = Annotated[float, typer.Option(help="Parameters of the whole model, as 10.6e6.")]
DevicesOption = Annotated[int, typer.Option(min=1, help="Devices that take part in an iteration.")]
BottomOption = Annotated[
    float, typer.Option("--bottom-parameters", help="Parameters below the cut; 0 counts no averages of them.")
]
EveryOption = Annotated[
    int,
    typer.Option("--average-every", min=1, help="Iterations from one average of the bottoms to the next."),
]
SamplesOption = Annotated[
    int | None, typer.Option(help="Training samples of all devices together: adds what an epoch sends.")
]
ClassesOption = Annotated[int, typer.Option(min=1, help="Classes of the labels, which cross too.")]
IndexOption = Annotated[
    str | None,
    typer.Option(help="bitmap, packed, elias-fano or rice; by default the smallest as expected."),
]
ValuesOption = Annotated[str, typer.Option(help="float32, float16 or int8.")]
UpOption = Annotated[float, typer.Option("--up", help="Bytes a second from a device, as 1e5.")]
DownOption = Annotated[float, typer.Option("--down", help="Bytes a second to a device.")]
RoundTripOption = Annotated[float, typer.Option("--round-trip-ms", help="Round trip of a device's link.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, all else on standard error.")
]


@federate.callback()
def _federate() -> None:
    """Train a network cut between devices and a server."""


@federate.command("traffic")
def traffic(
    cut_width: WidthOption,
    batch: BatchOption,
    parameters: ParametersOption,
    devices: DevicesOption,
    keep: KeepOption = 0.1,
    bottom_parameters: BottomOption = 0.0,
    average_every: EveryOption = 1,
    samples: SamplesOption = None,
    classes: ClassesOption = 2,
    index: IndexOption = None,
    values: ValuesOption = "float16",
    up: UpOption = 1e6,
    down: DownOption = 1e6,
    round_trip_ms: RoundTripOption = 50.0,
    as_json: JsonOption = False,
) -> None:
    """Say what split training sends, from dimensions alone, beside federated averaging.

    capstan federate traffic --cut-width 8192 --batch 32 --keep 0.1 --parameters 10.6e6 --devices 32
    """
    from capstan.federation.sparsifiers import TopK
    from capstan.federation.traffic import (
        CutDimensions,
        DeviceLink,
        plan_iteration,
        smallest_index,
        traffic_report,
    )
    from capstan.federation.wire import Wire

    dimensions = CutDimensions(
        cut_width=cut_width,
        batch=batch,
        num_devices=devices,
        num_parameters=_whole("--parameters", parameters),
        num_bottom_parameters=_whole("--bottom-parameters", bottom_parameters),
        average_every=average_every,
        num_classes=classes,
        num_samples=samples,
    )
    sparsifier = TopK(keep=keep)
    chosen = smallest_index(dimensions, keep, values) if index is None else index
    wire = Wire(sparsifier=sparsifier, index=chosen, value_type=values)
    report = traffic_report(dimensions, wire, keep)
    link = DeviceLink(up_bytes_per_s=up, down_bytes_per_s=down, round_trip_s=round_trip_ms / 1e3)
    _print_plan(plan_iteration(dimensions, wire, link, report), report, as_json)


ConfigArgument = Annotated[Path, typer.Argument(help="The job as a YAML file; see docs/federation.md.")]
CheckpointOption = Annotated[
    Path | None, typer.Option(help="Keep the job here after each epoch, and go on from it if it is there.")
]
ExplainOption = Annotated[bool, typer.Option("--explain", help="Print the plan and stop.")]


ProcessesOption = Annotated[
    bool, typer.Option("--processes", help="Each device in a process of its own, on this machine.")
]


@federate.command("run")
def run(
    config: ConfigArgument,
    checkpoint: CheckpointOption = None,
    explain: ExplainOption = False,
    processes: ProcessesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train as a YAML file says, all devices in this process; every byte becomes a message and is counted.

    capstan federate run job.yaml --checkpoint job.pt
    """
    from capstan.errors import UsageError, require_extra

    require_extra("torch", "torch")
    from capstan.federation.config import read_config
    from capstan.federation.runs import prepare_run, run_report, train_run
    from capstan.plans import compare
    from capstan.plans import explain as explain_plan

    if processes and not explain:
        if checkpoint is not None:
            raise UsageError("Devices in processes of their own keep their state: leave out --checkpoint.")
        serve_job(config, as_json, "federate run", starts_devices=True)
        return
    prepared = prepare_run(read_config(config), checkpoint)
    if explain:
        if as_json:
            typer.echo(json.dumps({"verb": "federate run", **run_report(prepared, None)}))
        else:
            typer.echo(explain_plan(prepared.plan), nl=False)
        return
    typer.echo(explain_plan(prepared.plan), nl=False, err=True)
    finished = train_run(prepared, checkpoint, tell_epoch)
    typer.echo(compare(prepared.plan, finished.trace), nl=False, err=as_json)
    if as_json:
        typer.echo(json.dumps({"verb": "federate run", **run_report(prepared, finished)}))


federate.command("serve")(serve)
federate.command("join")(join)


def _whole(option: str, number: float) -> int:
    from capstan.errors import UsageError

    if not (0 <= number < 2**62 and number == int(number)):
        raise UsageError(f"{option} wants a whole number such as 10.6e6, found {number}.")
    return int(number)


def _print_plan(plan: "Plan", report: dict[str, object], as_json: bool) -> None:
    from capstan.plans import explain

    if as_json:
        typer.echo(json.dumps({"verb": "federate traffic", **report, "plan": plan.to_dict()}))
    else:
        typer.echo(explain(plan), nl=False)
