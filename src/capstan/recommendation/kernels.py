"""row_kernels.c seen from Python: compiled once for this machine, called with the addresses of arrays."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from capstan.errors import DeviceError
from capstan.hardware.compiler import compiled

_SOURCE = Path(__file__).with_name("row_kernels.c")
LOOKED_UP, TABLE_FULL, BATCH_TOO_LARGE = range(3)
CELL = np.dtype([("id", np.uint64), ("row", np.int64)])
SCRATCH = np.dtype([("id", np.uint64), ("batch", np.uint32), ("index", np.uint32)])
NO_ROW = -1


class TableFields(ctypes.Structure):
    """`Table` of row_kernels.c."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("slab", "cells", "row_ids", "older", "newer", "used_at", "level", "oldest", "newest")
        ),
        ("seen", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("cell_mask", "seen_mask", "capacity", "stride", "dim")),
        *((name, ctypes.c_int64) for name in ("used", "first_free", "levels")),
        *((name, ctypes.c_int64) for name in ("evicted", "expired", "refused", "inserted", "time_to_live")),
        *((name, ctypes.c_uint64) for name in ("init_key", "admission_key", "admission_below")),
        ("admission_count", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("init_low", "init_width", "init_state")),
        ("state_floats", ctypes.c_int32),
    )


class UpdateFields(ctypes.Structure):
    """`Rule` of row_kernels.c."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        *(
            (name, ctypes.c_float)
            for name in ("lr", "eps", "momentum", "first_share", "second_share", "weight_decay", "bound")
        ),
    )


@cache
def kernels() -> Any:
    """The compiled library, its functions typed.

    Raises:
        DeviceError: there is no C compiler.
    """
    library = compiled(_SOURCE, {})
    if library is None:
        raise DeviceError(
            "Embedding tables need a C compiler, and none that works was found ($CC, cc, gcc, clang). "
            "Install one, for example with: apt-get install gcc"
        )
    address, count, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "distinct": (
            count,
            (address, count, address, count, address, count, ctypes.c_uint32, *4 * (address,)),
        ),
        "probe": (ctypes.c_int, (address, address, count, address, ctypes.c_int, count)),
        "initial": (None, (address, ctypes.c_uint64, address)),
        "insert": (None, (address, address, count, *3 * (address,))),
        "live_rows": (count, (address, address)),
        "pool": (None, (*4 * (address,), count, small, address, count, small)),
        "is_finite": (ctypes.c_int, (address, count)),
        "update": (count, (*4 * (address,), count, *3 * (address,), small, address, count, small)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"capstan_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def is_finite(values: np.ndarray) -> bool:
    """Whether no element of a contiguous float32 array is infinite or NaN."""
    return bool(kernels().capstan_is_finite(address_of(values), values.size))


def address_of(array: np.ndarray | None) -> int | None:
    """Where an array's elements start; None for none."""
    return None if array is None else array.ctypes.data
