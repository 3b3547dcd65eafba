"""`capstan train dp`: a training script on several ranks, by the algorithm named here."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from capstan.errors import CapstanError, InputError, unknown_name

train = typer.Typer(
    help="Train a model over slow links.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
)

ScriptOption = Annotated[
    Path,
    typer.Option(
        "--script", help="A training script that calls capstan.data_parallel.wrap(model, optimizer)."
    ),
]
AlgorithmOption = Annotated[
    str, typer.Option(help="What wrap() uses where the script names no algorithm; --explain compares them.")
]
RanksOption = Annotated[int, typer.Option(min=1, help="Processes on this machine.")]
MachinesOption = Annotated[int, typer.Option(min=1, help="Machines; start the same command on each.")]
RendezvousOption = Annotated[
    str | None, typer.Option(help="HOST:PORT of the first machine, for more than one machine.")
]
ArgumentsArgument = Annotated[list[str] | None, typer.Argument(help="Arguments of the script, after --.")]
ExplainOption = Annotated[
    bool, typer.Option("--explain", help="Print what each algorithm's step would take, and stop.")
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json", help="Print plan and trace as JSON; what the script prints goes to standard error."
    ),
]
ParametersOption = Annotated[float, typer.Option(help="For --explain: parameters of the model, as 1.1e9.")]
BandwidthOption = Annotated[
    float, typer.Option(help="For --explain and --json: Mbit/s of each rank, each way.")
]
LatencyOption = Annotated[
    float, typer.Option(help="For --explain and --json: one-way latency in milliseconds.")
]
ComputeOption = Annotated[float, typer.Option(help="For --explain and --json: seconds of a step's compute.")]


_STANDARD_ERROR = 2  # the descriptor: what is printed there now may be a test's


@train.callback()
def _train() -> None:
    """Train a model over slow links."""


@train.command("dp")
def data_parallel(
    arguments: ArgumentsArgument = None,
    script: ScriptOption = Path("train.py"),
    algorithm: AlgorithmOption = "gradient_allreduce",
    ranks: RanksOption = 2,
    machines: MachinesOption = 1,
    rendezvous: RendezvousOption = None,
    explain: ExplainOption = False,
    as_json: JsonOption = False,
    parameters: ParametersOption = 1e8,
    bandwidth_mbit: BandwidthOption = 1000.0,
    latency_ms: LatencyOption = 1.0,
    compute_s: ComputeOption = 0.5,
) -> None:
    """Run a script under torchrun, every rank with its share of the data.

    capstan train dp --script train.py --algorithm bytegrad --ranks 4 -- --epochs 3
    """
    # Imported here: torch takes seconds.
    from capstan.data_parallel.names import ALGORITHMS
    from capstan.data_parallel.planner import Network, Workload, choose, explain_algorithms, plan_of
    from capstan.data_parallel.recording import RECORD_VARIABLE
    from capstan.data_parallel.wrapping import ALGORITHM_VARIABLE

    if algorithm not in ALGORITHMS:
        raise unknown_name("algorithm", algorithm, ALGORITHMS)
    bandwidth_bytes_per_s, latency_s = bandwidth_mbit * 1e6 / 8, latency_ms / 1e3
    if explain:
        network = Network(
            num_ranks=ranks * machines, bandwidth_bytes_per_s=bandwidth_bytes_per_s, latency_s=latency_s
        )
        workload = Workload.even(int(parameters), compute_s=compute_s)
        if as_json:
            plan = plan_of(choose(workload, network)[0], workload, network)
            typer.echo(json.dumps({"verb": "train dp", "plan": plan.to_dict(), "trace": None}))
        else:
            typer.echo(explain_algorithms(workload, network))
        return
    if not script.is_file():
        raise InputError(
            f"There is no script {script}. Name one with --script; other words are its own arguments."
        )
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    if rendezvous is None:
        command.append("--standalone")
    else:
        command += [f"--nnodes={machines}", "--rdzv-backend=c10d", f"--rdzv-endpoint={rendezvous}"]
    command += [str(script), *(arguments or [])]
    environment = os.environ | {ALGORITHM_VARIABLE: algorithm}
    if not as_json:
        _run(command, environment)
        return
    with tempfile.TemporaryDirectory() as folder:
        wanted = {
            "folder": folder,
            "bandwidth_bytes_per_s": bandwidth_bytes_per_s,
            "latency_s": latency_s,
            "compute_s": compute_s,
        }
        _run(command, environment | {RECORD_VARIABLE: json.dumps(wanted)}, out=_STANDARD_ERROR)
        accounts = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank-*.json"))]
    if not accounts:
        raise CapstanError(
            f"{script} left no account: it wraps no model, or ends by os._exit. Wrap one with "
            "capstan.data_parallel.wrap, and let the script end by itself."
        )
    first = {name: accounts[0][name] for name in ("plan", "trace")}
    typer.echo(json.dumps({"verb": "train dp"} | first | {"ranks": accounts}))


def _run(command: list[str], environment: dict[str, str], *, out: int | None = None) -> None:
    """Run to the end; where that fails this process ends with the same code."""
    code = subprocess.run(command, env=environment, stdout=out, check=False).returncode
    if code != 0:
        raise typer.Exit(code)
