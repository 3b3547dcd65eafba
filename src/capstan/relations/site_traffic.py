"""The bytes that a decomposition sends between devices, predicted exactly, and an engine that counts them.

Device s holds block number s of a tensor (blocks in row-major order), and computes join number s. A join
gathers those parts of its inputs' boxes that lie elsewhere; its partial result is cut along the output's
blocks and each piece sent to the device that holds the block, where the pieces are folded.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, product
from math import prod

import numpy as np

from capstan.errors import InputError
from capstan.plans import Traffic
from capstan.relations.arrays import Array, fold_into, owned_copy
from capstan.relations.eindecomp import Decomposition, OperationPartition
from capstan.relations.partition_costs import Parts
from capstan.relations.stored_tensor import Box

Shape = tuple[int, ...]


def boxes(shape: Shape, parts: Parts) -> list[Box]:
    """The blocks of a partition in row-major order. Where the parts do not divide, sizes differ by one."""
    cuts = [[size * at // count for at in range(count + 1)] for size, count in zip(shape, parts, strict=True)]
    ranges = [list(pairwise(cut)) for cut in cuts]
    return [tuple(box) for box in product(*ranges)]


def overlap(first: Box, second: Box) -> Box | None:
    """The common part of two boxes."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(first, second, strict=True))
    return None if any(start >= stop for start, stop in both) else both


def _num_elements(box: Box) -> int:
    return prod(stop - start for start, stop in box)


def _joins(each: OperationPartition) -> Iterator[tuple[int, tuple[Box, ...], Box]]:
    """(device, boxes of the inputs, box of the output) for every join."""
    operation = each.operation
    shape = tuple(operation.sizes[label] for label in each.labels)
    for device, box in enumerate(boxes(shape, each.join)):
        place = dict(zip(each.labels, box, strict=True))
        inputs = tuple(tuple(place[label] for label in labels) for labels in operation.labels)
        yield device, inputs, tuple(place[label] for label in operation.output)


def _shape(each: OperationPartition, labels: str) -> Shape:
    return tuple(each.operation.sizes[label] for label in labels)


def predicted_traffic(each: OperationPartition) -> Traffic:
    """What one operation sends, per pair of devices: inputs' parts, then partial results."""
    operation = each.operation
    sent: dict[tuple[str, str], int] = {}

    def send(source: int, target: int, box: Box | None, content: str) -> None:
        if box is not None and source != target:
            key = (_link(source, target), content)
            sent[key] = sent.get(key, 0) + _num_elements(box) * operation.itemsize

    for device, inputs, output in _joins(each):
        for labels, parts, wanted in zip(operation.labels, each.inputs, inputs, strict=True):
            for home, block in enumerate(boxes(_shape(each, labels), parts)):
                send(home, device, overlap(wanted, block), "inputs")
        for home, block in enumerate(boxes(_shape(each, operation.output), each.output)):
            send(device, home, overlap(output, block), "partials")
    return Traffic(sent)


def _link(source: int, target: int) -> str:
    return f"device {source}->device {target}"


def run_on_devices(plan: Decomposition) -> tuple[Array, Traffic]:
    """Compute with one process standing for all devices; the result, and every byte that crossed.

    The oracle of the prediction: it moves pieces of arrays and counts what it moves.

    Raises:
        InputError: a leaf is on disk.
    """
    program = plan.program
    whole: dict[int, Array] = {}
    for number, value in enumerate(program.values):
        if value.is_stored:
            raise InputError(f"{value.name} is on disk; devices are simulated on arrays only.")
        if value.data is not None:
            whole[number] = value.data
    blocks: dict[int, tuple[Parts, list[Array]]] = {}
    total = Traffic()
    for each in plan.operations:
        placed = [
            _placed(number, parts, whole, blocks)
            for number, parts in zip(each.operation.inputs, each.inputs, strict=True)
        ]
        result, sent = _run_one(each, placed)
        blocks[each.operation.result] = (each.output, result)
        total = total + sent
    parts, pieces = blocks[program.result]
    shape = program.values[program.result].shape
    return _assembled(shape, list(zip(boxes(shape, parts), pieces, strict=True))), total


def _placed(
    number: int, parts: Parts, whole: Mapping[int, Array], blocks: Mapping[int, tuple[Parts, list[Array]]]
) -> list[Array]:
    if number in whole:
        return [whole[number][_slices(box)] for box in boxes(tuple(whole[number].shape), parts)]
    kept, pieces = blocks[number]
    assert kept == parts, "a result is read in the partition that it was left in"
    return pieces


def _run_one(each: OperationPartition, placed: Sequence[list[Array]]) -> tuple[list[Array], Traffic]:
    operation, traffic = each.operation, Traffic()
    targets = boxes(_shape(each, operation.output), each.output)
    result: list[Array] = [None] * len(targets)
    filled: list[dict[Box, Array]] = [{} for _ in targets]
    for device, inputs, output in _joins(each):
        gathered = []
        for labels, parts, wanted, pieces in zip(operation.labels, each.inputs, inputs, placed, strict=True):
            found, sent = _gather(wanted, boxes(_shape(each, labels), parts), pieces, device)
            gathered.append(found)
            traffic = traffic + sent
        partial = operation.kernel(gathered)
        for home, block in enumerate(targets):
            common = overlap(output, block)
            if common is None:
                continue
            piece = owned_copy(partial[_slices(_within(common, output))])
            if home != device:
                traffic = traffic + Traffic({(_link(device, home), "partials"): piece.nbytes})
            if common in filled[home]:
                fold_into(operation.kernel.fold, filled[home][common], piece)
            else:
                filled[home][common] = piece
    for home, block in enumerate(targets):
        pieces_here = [(_within(box, block), piece) for box, piece in filled[home].items()]
        result[home] = _assembled(tuple(stop - start for start, stop in block), pieces_here)
    return result, traffic


def _gather(wanted: Box, homes: Sequence[Box], pieces: Sequence[Array], device: int) -> tuple[Array, Traffic]:
    found, sent = [], Traffic()
    for home, (block, piece) in enumerate(zip(homes, pieces, strict=True)):
        common = overlap(wanted, block)
        if common is None:
            continue
        part = piece[_slices(_within(common, block))]
        if home != device:
            part = owned_copy(part)
            sent = sent + Traffic({(_link(home, device), "inputs"): part.nbytes})
        found.append((_within(common, wanted), part))
    return _assembled(tuple(stop - start for start, stop in wanted), found), sent


def _within(inner: Box, outer: Box) -> Box:
    return tuple((a - c, b - c) for (a, b), (c, _) in zip(inner, outer, strict=True))


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def _assembled(shape: Shape, pieces: Sequence[tuple[Box, Array]]) -> Array:
    first = pieces[0][1]
    whole = first.new_empty(shape) if hasattr(first, "new_empty") else np.empty(shape, first.dtype)
    for box, piece in pieces:
        whole[_slices(box)] = piece
    return whole
