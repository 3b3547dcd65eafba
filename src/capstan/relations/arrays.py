"""NumPy arrays and torch tensors behind one handful of functions; torch is not imported for NumPy's sake."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from capstan.errors import InputError

# A NumPy array or a torch tensor: both index, add and multiply alike.
Array = Any


def is_torch(array: Array) -> bool:
    """Whether this is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def checked_array(array: Array) -> Array:
    """`array` as it is, or a NumPy array of a plain number or nested list.

    Raises:
        InputError: its elements are not booleans or numbers, or one of its dimensions is empty.
    """
    if is_torch(array):
        kept = array
    else:
        try:
            kept = np.asarray(array)
        except ValueError as error:
            raise InputError(f"An operand is no array: {error}. Its rows must have one length.") from error
        if kept.dtype.kind not in "biufc":
            raise InputError(f"An operand has elements of type {kept.dtype}; numbers or booleans are needed.")
    if 0 in kept.shape:
        raise InputError(f"An operand has shape {tuple(kept.shape)}: no dimension may be empty.")
    return kept


def dtype_name(array: Array) -> str:
    """`"float32"` of either kind of array."""
    return str(array.dtype).removeprefix("torch.")


def library(array: Array) -> str:
    """`"torch"` or `"numpy"`."""
    return "torch" if is_torch(array) else "numpy"


def size_bytes(array: Array) -> int:
    """Bytes of the elements."""
    return int(array.nbytes)


def permute(array: Array, order: Sequence[int]) -> Array:
    """The dimensions of `array` in another order; a view."""
    return array.permute(tuple(order)) if is_torch(array) else np.transpose(array, order)


def concatenate(arrays: Sequence[Array], dim: int) -> Array:
    """Glue along an existing dimension."""
    if is_torch(arrays[0]):
        return sys.modules["torch"].cat(list(arrays), dim=dim)
    return np.concatenate(arrays, axis=dim)


_NUMPY_FOLDS = {
    "sum": np.add,
    "prod": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "or": np.logical_or,
    "and": np.logical_and,
}


def fold(name: str) -> Callable[[Array, Array], Array]:
    """The commutative, associative function of two arrays that `name` stands for."""

    def folded(left: Array, right: Array) -> Array:
        if is_torch(left) or is_torch(right):
            return getattr(sys.modules["torch"], _NUMPY_FOLDS[name].__name__)(left, right)
        return np.asarray(_NUMPY_FOLDS[name](left, right))  # of scalars it returns no array

    return folded


def fold_into(name: str, total: Array, part: Array) -> None:
    """`total = fold(total, part)` without another array."""
    if is_torch(total):
        getattr(sys.modules["torch"], _NUMPY_FOLDS[name].__name__)(total, part, out=total)
    else:
        _NUMPY_FOLDS[name](total, part, out=total)


def reduce(name: str, array: Array, dims: Sequence[int]) -> Array:
    """Fold the dimensions `dims` away; the dtype stays."""
    if not dims:
        return array
    if not is_torch(array):
        kept_dtype = {"dtype": array.dtype} if name in {"sum", "prod"} else {}
        return np.asarray(_NUMPY_FOLDS[name].reduce(array, axis=tuple(dims), **kept_dtype))
    if name == "sum":
        return array.sum(dim=tuple(dims), dtype=array.dtype)
    for dim in sorted(dims, reverse=True):
        if name == "prod":
            array = array.prod(dim=dim, dtype=array.dtype)
        else:
            array = getattr(array, {"max": "amax", "min": "amin", "or": "any", "and": "all"}[name])(dim=dim)
    return array


def owned_copy(array: Array) -> Array:
    """A contiguous copy that nobody else sees."""
    if is_torch(array):
        return array.clone(memory_format=sys.modules["torch"].contiguous_format)
    return np.array(array, order="C")
