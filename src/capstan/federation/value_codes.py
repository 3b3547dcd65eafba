"""Numbers as they cross the cut: 32, 16 or 8 bits each, and labels in whole bytes. NumPy only.

16 bits are IEEE half precision of value / scale, where scale is the power of two at or above the largest
absolute value: gradients of a mean over a big batch would vanish in half precision without it. A power of
two costs no accuracy: |decoded - value| <= 2^-11 |value| + 2^-25 scale. 8 bits are round(127 value / scale),
where scale is the largest absolute value: |decoded - value| <= scale / 254, and what float32 rounds.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from capstan.errors import InputError, unknown_name

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

VALUE_TYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "uint16": np.dtype("<u2"),
}
"""What elements are written as, by name. The unsigned ones are for labels."""
FLOATING = ("float32", "float16", "int8")


def value_bytes(name: str, count: int) -> int:
    """The exact size of `count` numbers."""
    return count * _type(name).itemsize


def label_type(num_classes: int) -> str:
    """The narrowest type that holds labels from 0 to `num_classes - 1`."""
    if not 1 <= num_classes <= 2**16:
        raise InputError(f"Wanted 1 to {2**16} classes, found {num_classes}.")
    return "uint8" if num_classes <= 2**8 else "uint16"


def write_values(name: str, values: NDArray[Any]) -> tuple[Bytes, float]:
    """Flat `values` as bytes, and their scale.

    Raises:
        InputError: a value is not finite, or a label does not fit.
    """
    target = _type(name)
    if name not in FLOATING:
        if len(values) and not (values.min() >= 0 and values.max() <= np.iinfo(target).max):
            raise InputError(f"Labels must fit in {name}, found {values.min()} to {values.max()}.")
        return np.ascontiguousarray(values, target).view(np.uint8), 1.0
    values = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(values).all():
        raise InputError("Only finite numbers cross the cut, found NaN or infinity: training has diverged.")
    scale = _scale(name, values)
    scaled = values if name == "float32" else values / np.float32(scale)
    if name == "int8":
        scaled = np.rint(scaled * np.float32(127)).clip(-127, 127)
    return np.ascontiguousarray(scaled.astype(target)).view(np.uint8), scale


def read_values(name: str, payload: Bytes, scale: float) -> NDArray[Any]:
    """The inverse of `write_values`: float32, or int64 labels.

    Raises:
        InputError: `write_values` would not write these bytes with this scale.
    """
    target = _type(name)
    if len(payload) % target.itemsize:
        raise InputError(f"{len(payload)} bytes are not a whole number of {name}.")
    found = np.frombuffer(payload.tobytes(), target)
    if name not in FLOATING:
        return found.astype(np.int64)
    if not (np.isfinite(scale) and scale > 0) or (name == "float32" and scale != 1):
        raise InputError(f"A scale of {scale} for {name} is not one that is written: the packet is damaged.")
    with np.errstate(over="ignore", invalid="ignore"):
        values = found.astype(np.float32)
        if name == "int8":
            values /= np.float32(127)
        values *= np.float32(scale)
    if not np.isfinite(values).all():
        raise InputError("Only finite numbers cross the cut, found NaN or infinity: the packet is damaged.")
    return values


def _type(name: str) -> np.dtype[Any]:
    if name not in VALUE_TYPES:
        raise unknown_name("value type", name, VALUE_TYPES)
    return VALUE_TYPES[name]


def _scale(name: str, values: Floats) -> float:
    largest = float(np.abs(values).max(initial=0.0))
    if name == "float32" or largest == 0:
        return 1.0
    if name == "int8":
        return max(largest, float(np.finfo(np.float32).tiny))
    exponent = int(np.ceil(np.log2(largest)))
    return float(2.0 ** min(max(exponent, -126), 127))
