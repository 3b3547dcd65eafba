"""How fast this process multiplies, folds and reads: measured in hundredths of a second, for predictions.

No decision hangs on them: tiles are chosen by bytes and calls.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import numpy as np

from capstan.relations.arrays import Array
from capstan.relations.program import Contraction, Operation, Program
from capstan.relations.semirings import SUM_PRODUCT
from capstan.relations.stored_tensor import StoredTensor

_MOST_BYTES = 8 * 2**20
_MOST_EDGE = 384


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Products of a matrix multiply, applications of any other inner function, and bytes of a file."""

    products_per_s: float
    folds_per_s: float
    disk_bytes_per_s: float

    def compute_s(self, operation: Operation) -> float:
        """Seconds of the kernel calls of one operation."""
        is_product = isinstance(operation.kernel, Contraction) and operation.kernel.semiring == SUM_PRODUCT
        multiplies = is_product and len(operation.inputs) == 2
        return operation.num_products / (self.products_per_s if multiplies else self.folds_per_s)


ASSUMED = Rates(products_per_s=2e10, folds_per_s=5e8, disk_bytes_per_s=1e9)


def measured_rates(program: Program, budget_bytes: int | None) -> Rates:
    """The rates of this process for a program's kind of elements, its files read as they now lie in cache.

    Measuring keeps to the budget too.
    """
    most = _MOST_BYTES if budget_bytes is None else min(budget_bytes // 2, _MOST_BYTES)
    itemsize = program.values[program.result].itemsize
    edge = max(min(isqrt(most // (3 * itemsize)), _MOST_EDGE), 1)
    matrix = _filled(program, (edge, edge))
    sum_s = _seconds(lambda: matrix + matrix)
    product_s = sum_s if program.dtype == "bool" else _seconds(lambda: matrix @ matrix)
    stored = next((value.data for value in program.values if value.is_stored), None)
    return Rates(
        products_per_s=edge**3 / product_s,
        folds_per_s=edge**2 / 2 / sum_s,  # a fold is a multiplication and an addition, with an array between
        disk_bytes_per_s=ASSUMED.disk_bytes_per_s if stored is None else _read_rate(stored, most),
    )


def _filled(program: Program, shape: tuple[int, ...]) -> Array:
    if program.library == "torch":
        import torch

        return torch.ones(shape, dtype=getattr(torch, program.dtype))
    return np.ones(shape, dtype=program.dtype)


def _seconds(call: Callable[[], object]) -> float:
    """The faster of two calls: the first one may load a library."""
    found = []
    for _ in range(2):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return max(min(found), 1e-7)


def _read_rate(stored: StoredTensor, most_bytes: int) -> float:
    if not stored.shape:
        return ASSUMED.disk_bytes_per_s
    rows = min(most_bytes * stored.shape[0] // stored.nbytes, stored.shape[0])
    if rows == 0 or stored.is_fortran:
        return ASSUMED.disk_bytes_per_s
    box = ((0, rows), *((0, size) for size in stored.shape[1:]))
    return rows * (stored.nbytes // stored.shape[0]) / _seconds(lambda: stored.read(box))
