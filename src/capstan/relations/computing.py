"""From an expression to its numbers: plan under a budget, run, account."""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capstan.errors import InputError, UsageError
from capstan.plans import Plan, Trace, parse_bytes
from capstan.relations.accounts import plan_of, trace_of
from capstan.relations.arrays import is_torch
from capstan.relations.expression import Expression
from capstan.relations.memory_plan import MemoryPlan, plan_memory
from capstan.relations.program import Program, lower
from capstan.relations.rates import ASSUMED, Rates, measured_rates
from capstan.relations.stored_tensor import StoredTensor, open_npy
from capstan.relations.tile_engine import run
from capstan.storage import open_atomically


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An expression that is planned and can be run."""

    memory_plan: MemoryPlan
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class Computed:
    """The result and its accounts; the result is an array, or the .npy file that was asked for."""

    result: Any
    plan: Plan
    trace: Trace


def prepare(
    expression: Expression,
    *,
    memory: str | int | None = None,
    threads: int = 1,
    is_output_on_disk: bool = False,
    rates: Rates | None = None,
) -> Prepared:
    """Plan an expression for this machine; nothing is read but headers, and a little to learn how fast.

    `memory` is what may be allocated, as `512MiB` or in bytes; without it everything is done in memory.
    Seconds are predicted by `rates`, measured where they are not given.

    Raises:
        UsageError: `memory` or `threads` is none.
        InputError: a budget was given for tensors that cannot go to disk.
        DoesNotFit: the budget is too small.
    """
    if threads < 1:
        raise UsageError(f"threads={threads}: at least one is needed.")
    budget = None if memory is None else parse_bytes(memory)
    program = lower(expression)
    if not program.operations:
        raise UsageError("The expression is a tensor already; there is nothing to compute.")
    if budget is not None or is_output_on_disk:
        _check_can_go_to_disk(program)
    chosen = plan_memory(
        program, budget_bytes=budget, num_threads=threads, is_output_on_disk=is_output_on_disk
    )
    plan = plan_of(chosen, title=expression.label, rates=rates or measured_rates(program, budget))
    return Prepared(memory_plan=chosen, plan=plan)


def _check_can_go_to_disk(program: Program) -> None:
    if program.dtype == "bfloat16":
        raise InputError(
            "bfloat16 has no place in a .npy file: convert to float32, or give no memory budget."
        )
    for value in program.values:
        if is_torch(value.data) and value.data.device.type != "cpu":
            raise InputError(
                f"An operand lies on {value.data.device}; a memory budget and output files are for tensors "
                "in main memory."
            )


def compute_with_accounts(
    expression: Expression,
    *,
    memory: str | int | None = None,
    threads: int = 1,
    output: Path | str | None = None,
    scratch: Path | str | None = None,
    rates: Rates | None = None,
) -> Computed:
    """As `compute`, with the plan and the trace beside the result."""
    path = None if output is None else Path(output)
    if path is not None:
        _check_output(expression, path)
    prepared = prepare(
        expression, memory=memory, threads=threads, is_output_on_disk=path is not None, rates=rates
    )
    if scratch is not None and not Path(scratch).is_dir():
        raise InputError(f"There is no folder {scratch} for results in between; make it first.")
    with ExitStack() as open_until_done:
        home = scratch or (path.parent if path else None)
        folder = None
        if prepared.memory_plan.scratch_bytes:
            folder = open_until_done.enter_context(
                tempfile.TemporaryDirectory(prefix=".capstan-relate-", dir=home)
            )
        unfinished = None if path is None else open_until_done.enter_context(open_atomically(path))
        done = run(
            prepared.memory_plan,
            output=None if unfinished is None else Path(unfinished.name),
            scratch=None if folder is None else Path(folder),
        )
    result = done.result if path is None else open_npy(path)
    trace = trace_of(prepared.memory_plan, done, title=prepared.plan.title)
    return Computed(result=result, plan=prepared.plan, trace=trace)


def compute(
    expression: Expression,
    *,
    memory: str | int | None = None,
    threads: int = 1,
    output: Path | str | None = None,
    scratch: Path | str | None = None,
) -> Any:
    """The value of an expression: an array, or an open .npy file where `output` names one.

    Within `memory` (as `512MiB`) everything is in memory if that fits, each contraction one call; else it is
    cut into tiles, and what does not fit goes to the folder `scratch`, by default the output's or the
    system's for temporary files. `threads` is how many tiles are computed at once: BLAS has threads of its
    own, so more than one pays where the disk is slow. The output appears under its name only when it is
    whole.

    Raises:
        UsageError: an option is none.
        InputError: an operand is cut short, the output is also an operand, or its folder does not exist.
        DoesNotFit: the memory or the disk is too small; the error names what is needed.
    """
    return compute_with_accounts(
        expression, memory=memory, threads=threads, output=output, scratch=scratch, rates=ASSUMED
    ).result


def _check_output(expression: Expression, path: Path) -> None:
    if path.suffix != ".npy":
        raise UsageError(f"The output {path} must end in .npy.")
    if not path.parent.is_dir():
        raise InputError(f"There is no folder {path.parent} for the output {path.name}.")
    if path.is_dir():
        raise InputError(f"The output {path} is a folder.")
    for value in lower(expression).values:
        if isinstance(value.data, StoredTensor) and path.exists() and path.samefile(value.data.path):
            raise InputError(f"The output {path} is also an operand; name another file.")
