"""What "multiply" and "add" mean in a contraction: a semiring, and the kernels of one and two operands.

    out[o] = add over c of multiply(left[l], right[r])

with `o` the output's labels and `c` the labels that it lacks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from capstan.errors import InputError, unknown_name
from capstan.relations.arrays import Array, fold, fold_into, is_torch, permute, reduce


@dataclass(frozen=True, kw_only=True)
class Semiring:
    """`add` folds, `multiply` joins; `multiply` distributes over `add`."""

    name: str
    add: str
    multiply: str

    def check_dtype(self, dtype: str) -> None:
        """Refuse elements for which this semiring is none.

        Raises:
            InputError: or-and of numbers, or arithmetic of booleans.
        """
        if (self.name == "or-and") != (dtype == "bool"):
            wanted = "booleans" if self.name == "or-and" else "numbers"
            raise InputError(
                f"The semiring {self.name} needs {wanted}, but the operands are {dtype}. "
                "Convert them, or choose another semiring."
            )
        if self.add in {"max", "min"} and dtype.startswith("complex"):
            raise InputError(f"The semiring {self.name} needs an order, and {dtype} has none.")


SUM_PRODUCT = Semiring(name="sum-product", add="sum", multiply="prod")
MAX_PLUS = Semiring(name="max-plus", add="max", multiply="sum")
MIN_PLUS = Semiring(name="min-plus", add="min", multiply="sum")
OR_AND = Semiring(name="or-and", add="or", multiply="and")
SEMIRINGS: Mapping[str, Semiring] = {
    semiring.name: semiring for semiring in (SUM_PRODUCT, MAX_PLUS, MIN_PLUS, OR_AND)
}


def semiring_named(name: str) -> Semiring:
    """The semiring called `name`.

    Raises:
        UsageError: there is none.
    """
    if name not in SEMIRINGS:
        raise unknown_name("semiring", name, SEMIRINGS)
    return SEMIRINGS[name]


def contract_one(labels: str, array: Array, output: str, semiring: Semiring) -> Array:
    """Fold away the labels that `output` lacks and order the rest; a repeated label takes the diagonal."""
    for label in dict.fromkeys(labels):
        while labels.count(label) > 1:
            labels, array = _diagonal(labels, array, label)
    dropped = [at for at, label in enumerate(labels) if label not in output]
    kept = [label for label in labels if label in output]
    return permute(reduce(semiring.add, array, dropped), [kept.index(label) for label in output])


def contract_pair(
    left_labels: str, left: Array, right_labels: str, right: Array, output: str, semiring: Semiring
) -> Array:
    """Join two arrays on their common labels and fold away the labels that `output` lacks.

    Sums of products become one batched matrix multiply; other semirings fold one contracted index after
    the other, so that no more than two arrays of the output's size are alive.
    """
    left_kept = _wanted(left_labels, right_labels + output)
    right_kept = _wanted(right_labels, left_labels + output)
    left = contract_one(left_labels, left, left_kept, semiring)
    right = contract_one(right_labels, right, right_kept, semiring)
    if semiring == SUM_PRODUCT:
        return _multiply_matrices(left_kept, left, right_kept, right, output)
    return _fold_slices(left_kept, left, right_kept, right, output, semiring)


def _wanted(labels: str, others: str) -> str:
    return "".join(label for label in dict.fromkeys(labels) if label in others)


def _diagonal(labels: str, array: Array, label: str) -> tuple[str, Array]:
    first = labels.index(label)
    second = labels.index(label, first + 1)
    rest = labels[:first] + labels[first + 1 : second] + labels[second + 1 :]
    return rest + label, array.diagonal(0, first, second)  # both libraries put the diagonal last


def _multiply_matrices(left_labels: str, left: Array, right_labels: str, right: Array, output: str) -> Array:
    sizes = dict(zip(left_labels, left.shape, strict=True)) | dict(
        zip(right_labels, right.shape, strict=True)
    )
    batch = [label for label in left_labels if label in right_labels and label in output]
    shared = [label for label in left_labels if label in right_labels and label not in output]
    rows = [label for label in left_labels if label not in right_labels]
    columns = [label for label in right_labels if label not in left_labels]

    def matrix(labels: str, array: Array, *groups: list[str]) -> Array:
        order = [labels.index(label) for group in groups for label in group]
        shape = [prod(sizes[label] for label in group) for group in groups]
        if not batch:
            shape = shape[1:]
        return _for_blas(permute(array, order).reshape(shape))

    product_ = matrix(left_labels, left, batch, rows, shared) @ matrix(
        right_labels, right, batch, shared, columns
    )
    found = [*batch, *rows, *columns]
    product_ = product_.reshape([sizes[label] for label in found])
    return permute(product_, [found.index(label) for label in output])


def _for_blas(array: Array) -> Array:
    """NumPy multiplies matrices without BLAS, many times slower, unless one of two strides is an element."""
    if is_torch(array) or array.itemsize in array.strides[-2:]:
        return array
    return np.ascontiguousarray(array)


def _fold_slices(
    left_labels: str, left: Array, right_labels: str, right: Array, output: str, semiring: Semiring
) -> Array:
    shared = [label for label in left_labels if label in right_labels and label not in output]
    ranges = [range(left.shape[left_labels.index(label)]) for label in shared]
    multiply = fold(semiring.multiply)
    total: Array = None
    for indices in product(*ranges):
        at = dict(zip(shared, indices, strict=True))
        part = multiply(_slice(left_labels, left, at, output), _slice(right_labels, right, at, output))
        if total is None:
            total = part
        else:
            fold_into(semiring.add, total, part)
    return total


def _slice(labels: str, array: Array, at: Mapping[str, int], output: str) -> Array:
    """`array` at the contracted indices, its other dimensions where `output` has them, size 1 elsewhere."""
    array = array[tuple(at.get(label, slice(None)) for label in labels)]
    kept = [label for label in labels if label not in at]
    ordered = permute(array, [kept.index(label) for label in output if label in kept])
    return ordered[tuple(slice(None) if label in kept else None for label in output)]
