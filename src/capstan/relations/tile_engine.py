"""Runs a memory plan: whole values in memory, or tile by tile from disk to disk."""

import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from shutil import disk_usage
from typing import Any

import numpy as np

from capstan.errors import DoesNotFit
from capstan.plans import bytes_text
from capstan.relations.arrays import Array, fold_into, is_torch, owned_copy, size_bytes
from capstan.relations.memory_account import MemoryAccount, WorkMeter
from capstan.relations.memory_plan import MemoryPlan, OperationPlan, write_block_bytes
from capstan.relations.program import Contraction, Operation, Program
from capstan.relations.stored_tensor import Box, StoredTensor, create_npy


@dataclass(frozen=True, kw_only=True)
class OperationTrace:
    """What one operation took."""

    name: str
    seconds: float
    meter: WorkMeter


@dataclass(frozen=True, kw_only=True)
class Run:
    """The result, an array or an open .npy file, and what each operation took."""

    result: Any
    operations: tuple[OperationTrace, ...]
    peak_bytes: int


def run(plan: MemoryPlan, *, output: Path | None, scratch: Path | None) -> Run:
    """Run every operation; intermediate results on disk go to the folder `scratch`, which a plan without
    any does without.

    The output is written to `output` itself: whoever wants it to appear at once hands a temporary name.

    Raises:
        DoesNotFit: the disk has no room for what the plan writes.
        InputError: a stored operand was cut short since it was opened.
    """
    _check_disk(plan, output, scratch)
    program, account = plan.program, MemoryAccount()
    values: dict[int, Any] = {
        number: value.data for number, value in enumerate(program.values) if value.data is not None
    }
    last, traces = program.last_uses(), []
    owned: dict[int, int] = {}
    for at, each in enumerate(plan.operations):
        started, meter = time.perf_counter(), WorkMeter()
        is_final = each.operation.result == program.result
        path = output if is_final else None
        stored = _created(program, each, path, scratch) if each.is_result_on_disk else None
        if each.tiling is None:
            _load_inputs(each.operation, values, owned, account, meter)
            result = _run_direct(each, values, stored, account, meter)
        else:
            result = _run_tiled(plan, each, values, stored, account, meter)
        values[each.operation.result] = result
        if not isinstance(result, StoredTensor):
            owned[each.operation.result] = size_bytes(result)
        seconds = time.perf_counter() - started
        traces.append(OperationTrace(name=each.operation.name, seconds=seconds, meter=meter))
        _release(at, last, values, owned, account, scratch)
    result = values[program.result]
    return Run(result=result, operations=tuple(traces), peak_bytes=account.peak_bytes)


def _check_disk(plan: MemoryPlan, output: Path | None, scratch: Path | None) -> None:
    needed: dict[int, tuple[Path, int]] = {}  # by file system
    written = [] if scratch is None else [(scratch, plan.scratch_bytes)]
    if output is not None:
        written.append((output.parent, plan.program.values[plan.program.result].size_bytes))
    for folder, size in written:
        system = os.stat(folder).st_dev
        needed[system] = (folder, size + needed.get(system, (folder, 0))[1])
    for folder, size in needed.values():
        free = disk_usage(folder).free
        if size > free:
            raise DoesNotFit(
                f"The plan writes {bytes_text(size)} under {folder}, where {bytes_text(free)} are free. "
                "Name another folder, or grant more memory so that less is written."
            )


def _created(program: Program, each: OperationPlan, path: Path | None, scratch: Path | None) -> StoredTensor:
    if path is None:
        assert scratch is not None, "a plan with results in between on disk is run with a folder for them"
        path = scratch / f"value-{each.operation.result}.npy"
    return create_npy(path, program.values[each.operation.result].shape, np.dtype(program.dtype))


def _release(
    at: int,
    last: Mapping[int, int],
    values: dict[int, Any],
    owned: dict[int, int],
    account: MemoryAccount,
    scratch: Path | None,
) -> None:
    for number in [number for number in values if last.get(number, at) <= at]:
        dropped = values.pop(number)
        account.add(-owned.pop(number, 0))
        if isinstance(dropped, StoredTensor) and dropped.path.parent == scratch:
            dropped.path.unlink(missing_ok=True)


def _load_inputs(
    operation: Operation,
    values: dict[int, Any],
    owned: dict[int, int],
    account: MemoryAccount,
    meter: WorkMeter,
) -> None:
    for number in operation.inputs:
        stored = values[number]
        if isinstance(stored, StoredTensor):
            account.add(stored.nbytes)
            with meter.timing("read", stored.nbytes):
                values[number] = stored.read(tuple((0, size) for size in stored.shape))
            owned[number] = stored.nbytes


def _run_direct(
    each: OperationPlan,
    values: Mapping[int, Any],
    stored: StoredTensor | None,
    account: MemoryAccount,
    meter: WorkMeter,
) -> Any:
    operation = each.operation
    inputs = _squeezed_inputs(operation, values)
    with account.holding(each.peak_bytes - each.resident_bytes):
        with meter.timing("computed"):
            result = operation.kernel(inputs)
            if isinstance(operation.kernel, Contraction) and len(inputs) == 1:
                result = owned_copy(result)
        if stored is not None:
            with meter.timing("written", stored.nbytes):
                _write_blocks(stored, result)
            return stored
    account.add(size_bytes(result))
    return result


def _write_blocks(stored: StoredTensor, result: Array) -> None:
    if not stored.shape:
        stored.write((), _as_numpy(result))
        return
    rows = max(write_block_bytes(stored.nbytes, stored.shape) * stored.shape[0] // stored.nbytes, 1)
    for start in range(0, stored.shape[0], rows):
        stop = min(start + rows, stored.shape[0])
        box = ((start, stop), *((0, size) for size in stored.shape[1:]))
        stored.write(box, _as_numpy(result[start:stop]))


def squeeze(value: Any, dims: tuple[int, ...]) -> Any:
    """A value without dimensions of size 1."""
    if not dims:
        return value
    if isinstance(value, StoredTensor):
        return replace(value, shape=tuple(size for at, size in enumerate(value.shape) if at not in dims))
    return value[tuple(0 if at in dims else slice(None) for at in range(len(value.shape)))]


def _squeezed_inputs(operation: Operation, values: Mapping[int, Any]) -> list[Any]:
    return [
        squeeze(values[number], dims)
        for number, dims in zip(operation.inputs, operation.squeezed, strict=True)
    ]


def _run_tiled(
    plan: MemoryPlan,
    each: OperationPlan,
    values: Mapping[int, Any],
    stored: StoredTensor | None,
    account: MemoryAccount,
    meter: WorkMeter,
) -> Any:
    operation, tiling = each.operation, each.tiling
    assert tiling is not None
    inputs = _squeezed_inputs(operation, values)
    if stored is None:
        result: Any = _empty(plan.program, operation)
        account.add(size_bytes(result))
    else:
        result = stored
    task = _TileTask(plan.program, operation, tiling.tiles, inputs, result, account, meter)
    with ThreadPoolExecutor(plan.num_threads, thread_name_prefix="tiles") as pool:
        waiting: set[Future[None]] = set()
        for box in _boxes(operation.output, operation.sizes, tiling.tiles):
            waiting.add(pool.submit(task, box))
            if len(waiting) > 2 * plan.num_threads:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for each_done in done:
                    each_done.result()
        for future in waiting:
            future.result()
    return result


class _TileTask:
    """Computes one tile of the output at a time; called from several threads."""

    def __init__(
        self,
        program: Program,
        operation: Operation,
        tiles: Mapping[str, int],
        inputs: list[Any],
        result: Any,
        account: MemoryAccount,
        meter: WorkMeter,
    ) -> None:
        self._program, self._operation, self._tiles = program, operation, tiles
        self._inputs, self._result = inputs, result
        self._account, self._meter = account, meter

    def __call__(self, output_box: Mapping[str, tuple[int, int]]) -> None:
        operation = self._operation
        kept: list[tuple[Box, Array] | None] = [None] * len(self._inputs)
        total: Array = None
        with ExitStack() as held:
            slots = [held.enter_context(_Slot(self._account)) for _ in self._inputs]
            total_slot = held.enter_context(_Slot(self._account))
            for folded_box in _boxes(operation.folded, operation.sizes, self._tiles):
                place = {**output_box, **folded_box}
                for at, labels in enumerate(operation.labels):
                    box = tuple(place[label] for label in labels)
                    if kept[at] is None or kept[at][0] != box:  # type: ignore[index]
                        kept[at] = None  # lets go of the old tile before the new one is read
                        kept[at] = (box, self._tile(self._inputs[at], box, slots[at]))
                total = self._folded(
                    total, [entry[1] for entry in kept if entry is not None], place, total_slot
                )
            with self._meter.timing("written", self._written_bytes(total)):
                self._put(tuple(output_box[label] for label in operation.output), total)

    def _tile(self, value: Any, box: Box, slot: "_Slot") -> Array:
        if not isinstance(value, StoredTensor):
            return value[tuple(slice(start, stop) for start, stop in box)]
        size = prod(stop - start for start, stop in box) * value.dtype.itemsize
        slot.hold(size)
        with self._meter.timing("read", size):
            return _like(self._program, value.read(box))

    def _folded(
        self, total: Array, tiles: list[Array], place: Mapping[str, tuple[int, int]], total_slot: "_Slot"
    ) -> Array:
        operation = self._operation
        sizes = {label: stop - start for label, (start, stop) in place.items()}
        scratch = operation.kernel.scratch_bytes(sizes, operation.itemsize)
        with self._account.holding(scratch), self._meter.timing("computed"):
            part = operation.kernel(tiles)
            if total is not None:
                fold_into(operation.kernel.fold, total, part)
                return total
            total_slot.hold(size_bytes(part))
            return owned_copy(part)

    def _written_bytes(self, tile: Array) -> int:
        return size_bytes(tile) if isinstance(self._result, StoredTensor) else 0

    def _put(self, box: Box, tile: Array) -> None:
        if isinstance(self._result, StoredTensor):
            self._result.write(box, _as_numpy(tile))
        else:
            self._result[tuple(slice(start, stop) for start, stop in box)] = tile


class _Slot:
    """Holds the size of one array at a time in an account, and nothing after the block."""

    def __init__(self, account: MemoryAccount) -> None:
        self._account, self._held = account, 0

    def hold(self, size: int) -> None:
        self._account.add(size - self._held)
        self._held = size

    def __enter__(self) -> "_Slot":
        return self

    def __exit__(self, *_: object) -> None:
        self.hold(0)


def _boxes(
    labels: str, sizes: Mapping[str, int], tiles: Mapping[str, int]
) -> Iterator[dict[str, tuple[int, int]]]:
    """Every tile as {label: (start, stop)}, the last label fastest; the tiles at the end may be smaller."""
    ranges = [
        [(start, min(start + tiles[label], sizes[label])) for start in range(0, sizes[label], tiles[label])]
        for label in labels
    ]
    for boxes in product(*ranges):
        yield dict(zip(labels, boxes, strict=True))


def _empty(program: Program, operation: Operation) -> Array:
    shape = tuple(operation.sizes[label] for label in operation.output)
    if program.library == "torch":
        import torch

        return torch.empty(shape, dtype=getattr(torch, program.dtype))
    return np.empty(shape, dtype=program.dtype)


def _like(program: Program, tile: np.ndarray) -> Array:
    if program.library == "torch":
        import torch

        return torch.from_numpy(tile)
    return tile


def _as_numpy(array: Array) -> np.ndarray:
    kept: np.ndarray = array.detach().numpy() if is_torch(array) else array
    return kept
