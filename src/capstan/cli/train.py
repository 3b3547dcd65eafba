"""`capstan train dp`: a training script on several ranks, by the algorithm named here."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from capstan.errors import InputError, unknown_name

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
ParametersOption = Annotated[float, typer.Option(help="For --explain: parameters of the model, as 1.1e9.")]
BandwidthOption = Annotated[float, typer.Option(help="For --explain: Mbit/s of each rank, each way.")]
LatencyOption = Annotated[float, typer.Option(help="For --explain: one-way latency in milliseconds.")]
ComputeOption = Annotated[float, typer.Option(help="For --explain: seconds of a step's compute.")]


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
    from capstan.data_parallel.planner import Network, Workload, explain_algorithms
    from capstan.data_parallel.replica import ALGORITHM_VARIABLE

    if algorithm not in ALGORITHMS:
        raise unknown_name("algorithm", algorithm, ALGORITHMS)
    if explain:
        network = Network(
            num_ranks=ranks * machines,
            bandwidth_bytes_per_s=bandwidth_mbit * 1e6 / 8,
            latency_s=latency_ms / 1e3,
        )
        typer.echo(explain_algorithms(Workload.even(int(parameters), compute_s=compute_s), network))
        return
    if not script.is_file():
        raise InputError(f"There is no script {script}. Name one with --script.")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    if rendezvous is None:
        command.append("--standalone")
    else:
        command += [f"--nnodes={machines}", "--rdzv-backend=c10d", f"--rdzv-endpoint={rendezvous}"]
    environment = os.environ | {ALGORITHM_VARIABLE: algorithm}
    done = subprocess.run([*command, str(script), *(arguments or [])], env=environment, check=False)
    if done.returncode != 0:
        raise typer.Exit(done.returncode)
