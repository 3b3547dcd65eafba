"""`capstan federate serve` and `join`: a job whose devices and server share no process."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from capstan.federation.job import EpochCounts
    from capstan.transport.sessions import Security

PortOption = Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 finds a free port.")]
HostOption = Annotated[
    str, typer.Option(help="The address to listen at; others than loopback want certificates and a token.")
]
CertificateOption = Annotated[Path | None, typer.Option(help="This side's certificate, PEM.")]
KeyOption = Annotated[Path | None, typer.Option(help="The certificate's key, PEM.")]
AuthorityOption = Annotated[
    Path | None, typer.Option("--ca", help="The certificate, PEM, of whoever signed the other side's.")
]
TokenOption = Annotated[Path | None, typer.Option("--token-file", help="A file with the token of the job.")]
AddressArgument = Annotated[str, typer.Argument(metavar="HOST:PORT", help="The server's address.")]
DeviceOption = Annotated[int, typer.Option(min=0, help="Which device this is, from 0.")]
DataOption = Annotated[
    Path | None,
    typer.Option(help="This device's samples, .npz, .csv or .parquet; else its part of the job's own data."),
]
InputsOption = Annotated[str | None, typer.Option(help="The array of inputs in an .npz file.")]
LabelOption = Annotated[str | None, typer.Option(help="The array or column of labels.")]


def serve(
    config: Annotated[Path, typer.Argument(help="The job as a YAML file; see docs/federation.md.")],
    port: PortOption = 0,
    host: HostOption = "127.0.0.1",
    certificate: CertificateOption = None,
    key: KeyOption = None,
    authority: AuthorityOption = None,
    token_file: TokenOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output, all else on the other.")
    ] = False,
) -> None:
    """Be the server of a job: wait until its devices have joined, train, and say what came of it.

    capstan federate serve job.yaml --port 7000
    """
    security = _security(certificate, key, authority, token_file)
    serve_job(config, as_json, "federate serve", host=host, port=port, security=security)


def join(
    address: AddressArgument,
    device: DeviceOption,
    data: DataOption = None,
    inputs: InputsOption = None,
    label: LabelOption = None,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    authority: AuthorityOption = None,
    token_file: TokenOption = None,
) -> None:
    """Be a device of a job: its samples stay here, and the layers below the cut are trained here.

    capstan federate join 127.0.0.1:7000 --device 3 --data beats.npz
    """
    from capstan.errors import require_extra

    require_extra("federation", "torch", "grpc")
    from capstan.federation.joining import DeviceSource, join_run
    from capstan.transport.sessions import Session

    source = None if data is None else DeviceSource(data, inputs, label)
    security = _security(certificate, key, authority, token_file)
    typer.echo(f"device {device} asks {address}, which has a minute to answer", err=True)
    with Session(address, name=f"device {device}", security=security) as session:
        tasks = join_run(session, device, source)
    typer.echo(f"device {device} did {tasks} tasks")


def serve_job(
    config: Path,
    as_json: bool,
    verb: str,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    security: "Security | None" = None,
    starts_devices: bool = False,
) -> None:
    """Train over sessions and print what came of it."""
    from capstan.errors import require_extra

    require_extra("federation", "torch", "grpc")
    from capstan.federation.config import read_config
    from capstan.federation.runs import run_report
    from capstan.federation.serving import serve_run
    from capstan.plans import bytes_text, compare
    from capstan.plans import explain as explain_plan

    job = read_config(config)
    served = serve_run(
        job,
        host=host,
        port=port,
        security=security,
        on_port=lambda found: typer.echo(f"{host}:{found} waits for {job.devices.count} devices", err=True),
        on_plan=lambda prepared: typer.echo(explain_plan(prepared.plan), nl=False, err=True),
        on_epoch=tell_epoch,
        starts_devices=starts_devices,
    )
    typer.echo(compare(served.prepared.plan, served.finished.trace), nl=False, err=as_json)
    crossed = f"{bytes_text(served.session_bytes)} crossed the sessions, envelopes and tasks counted"
    typer.echo(f"{crossed}; {served.late_results} results came late.", err=as_json)
    if as_json:
        report = run_report(served.prepared, served.finished)
        extra = {"session_bytes": served.session_bytes, "late_results": served.late_results}
        typer.echo(json.dumps({"verb": verb, **report, **extra}))


def tell_epoch(counts: "EpochCounts", accuracy: float) -> None:
    """A line of progress."""
    loss = "none, every iteration was skipped" if counts.loss is None else f"{counts.loss:.4f}"
    typer.echo(f"epoch {counts.epoch + 1}: loss {loss}, accuracy {accuracy:.4f}", err=True)


def _security(
    certificate: Path | None, key: Path | None, authority: Path | None, token_file: Path | None
) -> "Security":
    from capstan.transport.sessions import Security, read_token

    token = None if token_file is None else read_token(token_file)
    return Security(certificate=certificate, key=key, authority=authority, token=token)
