"""How to cut one operation so that it fits a budget and reads as little as possible.

Every label ℓ is cut into p_ℓ parts. One output tile is computed at a time; over the tiles of the folded
labels the inputs' tiles are read again and again. An input X with a labels set in(X) is read

    Π_(ℓ in the output, not in X) p_ℓ  ×  Π_(ℓ folded, not in X, outside X's innermost cut label) p_ℓ

times: a tile that the next step needs again is kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, prod

from capstan.relations.program import Operation
from capstan.relations.stored_tensor import first_of_run

# A positioned read and a kernel call cost about what copying this much does.
_READ_BYTES = 16 * 1024
_CALL_BYTES = 64 * 1024
# Smaller tiles would spend their time between kernels: what needs them is refused.
_SMALLEST_TILE = 16
_MOST_CANDIDATES = 40_000


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tile sizes per label, and what follows from them; `cost` weighs bytes, reads and calls, in bytes."""

    tiles: Mapping[str, int]
    working_bytes: int
    read_bytes: int
    num_calls: int
    cost: float

    def __str__(self) -> str:
        return " ".join(f"{label}={size}" for label, size in self.tiles.items())


def describe_tiling(operation: Operation, tiles: Mapping[str, int], on_disk: Sequence[bool]) -> Tiling:
    """What an operation costs when it is cut into these tiles; `on_disk` says which inputs are read."""
    parts = {label: ceil(operation.sizes[label] / tiles[label]) for label in tiles}
    loads = [
        _elements_read(operation, labels, tiles) * operation.itemsize * _times(operation, labels, parts)
        for labels, stored in zip(operation.labels, on_disk, strict=True)
        if stored
    ]
    num_calls = prod(parts.values())
    num_reads = sum(
        _num_runs(operation, labels, tiles) * _times(operation, labels, parts)
        for labels, stored in zip(operation.labels, on_disk, strict=True)
        if stored
    )
    num_writes = _num_runs(operation, operation.output, tiles)
    return Tiling(
        tiles=dict(tiles),
        working_bytes=working_bytes(operation, tiles, on_disk),
        read_bytes=sum(loads),
        num_calls=num_calls,
        cost=sum(loads) + _READ_BYTES * (num_reads + num_writes) + _CALL_BYTES * num_calls,
    )


def _elements_read(operation: Operation, labels: str, tiles: Mapping[str, int]) -> int:
    """Elements of an input's tiles; of one that names a label twice, only those on the diagonal."""
    total = 1
    for label in set(labels):
        whole, rest = divmod(operation.sizes[label], tiles[label])
        times = labels.count(label)
        total *= whole * tiles[label] ** times + rest**times
    return total


def working_bytes(operation: Operation, tiles: Mapping[str, int], on_disk: Sequence[bool]) -> int:
    """Bytes alive while one tile is computed: read tiles, the kernel's scratch, the output tile's total."""
    read = sum(
        prod(tiles[label] for label in labels) * operation.itemsize
        for labels, stored in zip(operation.labels, on_disk, strict=True)
        if stored
    )
    total = prod(tiles[label] for label in operation.output) * operation.itemsize
    return read + operation.kernel.scratch_bytes(tiles, operation.itemsize) + total


def _times(operation: Operation, labels: str, parts: Mapping[str, int]) -> int:
    spread = prod(parts[label] for label in operation.output if label not in labels)
    cut = [at for at, label in enumerate(operation.folded) if label in labels and parts[label] > 1]
    innermost = cut[-1] if cut else 0
    again = [label for label in operation.folded[:innermost] if label not in labels]
    return spread * prod(parts[label] for label in again)


def choose_tiling(operation: Operation, budget_bytes: int, on_disk: Sequence[bool]) -> Tiling | None:
    """The tiling with the least estimated time within the budget, of those whose parts are powers of two.

    None when even the smallest tiles do not fit: 16, or 1 along a label that every operand and the output
    has.
    """
    fitting = (
        describe_tiling(operation, tiles, on_disk)
        for tiles in _candidates(operation)
        if working_bytes(operation, tiles, on_disk) <= budget_bytes
    )
    return min(fitting, key=lambda each: each.cost, default=None)


def smallest_tiling(operation: Operation, on_disk: Sequence[bool]) -> Tiling:
    """The tiling that needs the least memory."""
    return describe_tiling(
        operation,
        {label: min(size, _smallest(operation, label)) for label, size in _sizes(operation)},
        on_disk,
    )


def _smallest(operation: Operation, label: str) -> int:
    is_batch = len(operation.inputs) > 1 and all(
        label in term for term in (*operation.labels, operation.output)
    )
    return 1 if is_batch else _SMALLEST_TILE


def _sizes(operation: Operation) -> list[tuple[str, int]]:
    return [(label, operation.sizes[label]) for label in operation.output + operation.folded]


def _candidates(operation: Operation) -> list[dict[str, int]]:
    """Tile sizes per label from halving it repeatedly, thinned out where the combinations are too many."""
    names = [label for label, _ in _sizes(operation)]
    choices = []
    for label, size in _sizes(operation):
        tiles, least = [size], _smallest(operation, label)
        while tiles[-1] > least:
            tiles.append(max(ceil(tiles[-1] / 2), least))
        choices.append(tiles)
    while prod(map(len, choices)) > _MOST_CANDIDATES:
        longest = max(choices, key=len)
        longest[1:-1] = longest[2:-1:2]
    return [dict(zip(names, tiles, strict=True)) for tiles in product(*choices)]


def _num_runs(operation: Operation, labels: str, tiles: Mapping[str, int]) -> float:
    shape = tuple(operation.sizes[label] for label in labels)
    tile = tuple(tiles[label] for label in labels)
    return prod(shape) / max(prod(tile[first_of_run(shape, tile) :]), 1)
