"""`capstan relate`: an einsum of .npy files within a memory budget, or its plan over several devices."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capstan.errors import UsageError

if TYPE_CHECKING:
    from capstan.plans import Plan
    from capstan.relations import Expression

SubscriptsArgument = Annotated[str, typer.Argument(help="What to compute, as in NumPy: 'ij,jk->ik'.")]
OperandsArgument = Annotated[list[Path], typer.Argument(help="One .npy file an operand.")]
OutputOption = Annotated[
    Path | None, typer.Option("--output", help="The result's .npy file; it appears when it is whole.")
]
MemoryOption = Annotated[
    str | None,
    typer.Option(help="What may be allocated beside the interpreter, as 512MiB; by default everything."),
]
SemiringOption = Annotated[str, typer.Option(help="sum-product, max-plus, min-plus or or-and.")]
MapOption = Annotated[
    list[str] | None, typer.Option("--map", help="Apply relu, exp, tanh, … to the result; may be repeated.")
]
ThreadsOption = Annotated[int, typer.Option(min=1, help="Tiles computed at once; BLAS has its own threads.")]
ScratchOption = Annotated[
    Path | None, typer.Option(help="Folder for results in between; by default the output's.")
]
DevicesOption = Annotated[
    int | None, typer.Option(min=1, help="Plan over this many devices, a power of two; nothing runs.")
]
BandwidthOption = Annotated[float, typer.Option(help="With --devices: Mbit/s that each device receives at.")]
ExplainOption = Annotated[
    bool, typer.Option("--explain", help="Print the plan and stop: only headers are read.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, all else on standard error.")
]


def relate(
    subscripts: SubscriptsArgument,
    operands: OperandsArgument,
    output: OutputOption = None,
    memory: MemoryOption = None,
    semiring: SemiringOption = "sum-product",
    maps: MapOption = None,
    threads: ThreadsOption = 1,
    scratch: ScratchOption = None,
    devices: DevicesOption = None,
    bandwidth_mbit: BandwidthOption = 1000.0,
    explain: ExplainOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compute an einsum of .npy files that need not fit in memory.

    capstan relate "ij,jk->ik" A.npy B.npy --output C.npy --memory 512MiB
    """
    from capstan.relations import apply, einsum, open_tensor

    expression: Expression = einsum(subscripts, *map(open_tensor, operands), semiring=semiring)
    for name in maps or ():
        expression = apply(name, expression)
    if devices is not None:
        _plan_devices(expression, devices, bandwidth_mbit, as_json)
    elif explain:
        _explain(expression, memory, threads, as_json)
    else:
        _compute(expression, memory, threads, output, scratch, as_json)


def _plan_devices(expression: "Expression", devices: int, bandwidth_mbit: float, as_json: bool) -> None:
    from capstan.relations import plan_for_devices

    found = plan_for_devices(expression, devices, bandwidth_bytes_per_s=bandwidth_mbit * 1e6 / 8)
    _print_plan(found.plan, as_json)


def _explain(expression: "Expression", memory: str | None, threads: int, as_json: bool) -> None:
    from capstan.relations import prepare

    prepared = prepare(expression, memory=memory, threads=threads, is_output_on_disk=True)
    _print_plan(prepared.plan, as_json)


def _print_plan(plan: "Plan", as_json: bool) -> None:
    from capstan.plans import explain

    if as_json:
        typer.echo(json.dumps({"verb": "relate", "plan": plan.to_dict()}))
    else:
        typer.echo(explain(plan), nl=False)


def _compute(
    expression: "Expression",
    memory: str | None,
    threads: int,
    output: Path | None,
    scratch: Path | None,
    as_json: bool,
) -> None:
    from capstan.plans import compare
    from capstan.relations import compute_with_accounts

    if output is None:
        raise UsageError("Say where the result goes with --output, or ask only for the plan with --explain.")
    done = compute_with_accounts(expression, memory=memory, threads=threads, output=output, scratch=scratch)
    typer.echo(compare(done.plan, done.trace), nl=False, err=as_json)
    if as_json:
        typer.echo(json.dumps(_report(output, done.plan.to_dict(), done.trace.to_dict(), expression.shape)))


def _report(output: Path, plan: Any, trace: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"verb": "relate", "output": str(output), "shape": list(shape), "plan": plan, "trace": trace}
