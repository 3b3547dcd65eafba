"""Which values lie in memory and which on disk, and how each operation is cut, so that a budget holds.

What the budget covers is what the engine allocates: tiles, scratch, values kept in memory, and a result
that is returned as an array. Arrays that the caller holds already, and the interpreter with its libraries,
are not part of it.
"""

from dataclasses import dataclass

from capstan.errors import DoesNotFit
from capstan.plans import bytes_text
from capstan.relations.program import Contraction, Operation, Program
from capstan.relations.subscripts import Shape
from capstan.relations.tiling import Tiling, choose_tiling, smallest_tiling

# A whole result goes to its file in blocks of this much.
WRITE_BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class OperationPlan:
    """How one operation runs. Without `tiling` its inputs are whole and in memory.

    `peak_bytes` counts everything alive meanwhile; `resident_bytes` the part of it that is not its own.
    """

    operation: Operation
    tiling: Tiling | None
    is_result_on_disk: bool
    resident_bytes: int
    peak_bytes: int
    read_bytes: int
    written_bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The operations of a program in order, each with what it takes."""

    program: Program
    operations: tuple[OperationPlan, ...]
    num_threads: int
    budget_bytes: int | None
    is_output_on_disk: bool

    @property
    def is_direct(self) -> bool:
        """Whether everything is in memory and each contraction is one call."""
        return all(each.tiling is None for each in self.operations)

    @property
    def peak_bytes(self) -> int:
        return max((each.peak_bytes for each in self.operations), default=0)

    @property
    def scratch_bytes(self) -> int:
        """Bytes of intermediate results that go to disk, all together."""
        results = {each.operation.result: each for each in self.operations if each.is_result_on_disk}
        return sum(
            self.program.values[number].size_bytes for number in results if number != self.program.result
        )


def plan_memory(
    program: Program, *, budget_bytes: int | None, num_threads: int = 1, is_output_on_disk: bool = False
) -> MemoryPlan:
    """The plan that reads least within the budget: everything in memory if that fits, else tiles.

    Raises:
        DoesNotFit: even the smallest tiles take more, or the result itself does and no file was named.
    """
    direct = _direct(program, is_output_on_disk)
    peak = max((each.peak_bytes for each in direct), default=0)
    if budget_bytes is None or peak <= budget_bytes:
        return MemoryPlan(
            program=program,
            operations=direct,
            num_threads=1,
            budget_bytes=budget_bytes,
            is_output_on_disk=is_output_on_disk,
        )
    result_bytes = program.values[program.result].size_bytes
    if not is_output_on_disk and result_bytes > budget_bytes:
        raise DoesNotFit(
            f"The result alone takes {bytes_text(result_bytes)} of a budget of {bytes_text(budget_bytes)}. "
            "Name a file for it with output=, or grant more memory."
        )
    needed = 0
    for threads in dict.fromkeys((num_threads, 1)):
        for keeps in (True, False):
            found = _tiled(program, budget_bytes, threads, is_output_on_disk, keeps)
            if isinstance(found, int):
                needed = found
                continue
            return MemoryPlan(
                program=program,
                operations=found,
                num_threads=threads,
                budget_bytes=budget_bytes,
                is_output_on_disk=is_output_on_disk,
            )
    raise DoesNotFit(
        f"The smallest tiles take {bytes_text(needed)}, but the budget is {bytes_text(budget_bytes)}. "
        f"Grant at least {needed} bytes."
    )


def _direct(program: Program, is_output_on_disk: bool) -> tuple[OperationPlan, ...]:
    last = program.last_uses()
    resident: dict[int, int] = {}
    plans = []
    for at, operation in enumerate(program.operations):
        loaded = {n for n in operation.inputs if program.values[n].is_stored and n not in resident}
        read = sum(program.values[number].size_bytes for number in loaded)
        resident |= {number: program.values[number].size_bytes for number in loaded}
        before = sum(resident.values())
        result = program.values[operation.result]
        is_last = at == len(program.operations) - 1
        writes = is_output_on_disk and is_last
        scratch = operation.kernel.scratch_bytes(operation.sizes, operation.itemsize)
        if isinstance(operation.kernel, Contraction) and len(operation.inputs) == 1:
            scratch += result.size_bytes  # copied, so that it shares no memory with its input
        block = write_block_bytes(result.size_bytes, result.shape) if writes else 0
        plans.append(
            OperationPlan(
                operation=operation,
                tiling=None,
                is_result_on_disk=writes,
                resident_bytes=before,
                peak_bytes=before + scratch + block,
                read_bytes=read,
                written_bytes=result.size_bytes if writes else 0,
            )
        )
        resident[operation.result] = result.size_bytes
        resident = {number: size for number, size in resident.items() if last.get(number, at) > at}
    return tuple(plans)


def write_block_bytes(size_bytes: int, shape: Shape) -> int:
    """The most that one block of a whole result takes while it is written: at least one row."""
    row = size_bytes // shape[0] if shape else size_bytes
    return min(size_bytes, max(row, WRITE_BLOCK_BYTES))


def _tiled(
    program: Program, budget: int, threads: int, is_output_on_disk: bool, keeps: bool
) -> tuple[OperationPlan, ...] | int:
    """Operation plans, or the bytes that would be needed."""
    last = program.last_uses()
    resident: dict[int, int] = {}
    on_disk = {number for number, value in enumerate(program.values) if value.is_stored}
    plans = []
    for at, operation in enumerate(program.operations):
        result = program.values[operation.result]
        if operation.result == program.result:
            stays = not is_output_on_disk
        else:
            stays = keeps and result.size_bytes <= budget // 4
            stays = stays and sum(resident.values()) + result.size_bytes <= budget // 2
        if stays:
            resident[operation.result] = result.size_bytes
        else:
            on_disk.add(operation.result)
        held = sum(resident.values())
        stored = [number in on_disk for number in operation.inputs]
        tiling = choose_tiling(operation, (budget - held) // threads, stored)
        if tiling is None:
            return held + threads * smallest_tiling(operation, stored).working_bytes
        plans.append(
            OperationPlan(
                operation=operation,
                tiling=tiling,
                is_result_on_disk=not stays,
                resident_bytes=held,
                peak_bytes=held + threads * tiling.working_bytes,
                read_bytes=tiling.read_bytes,
                written_bytes=0 if stays else result.size_bytes,
            )
        )
        resident = {number: size for number, size in resident.items() if last.get(number, at) > at}
    return tuple(plans)
