"""The element types that packets carry, and what each of them can hold."""

import math

import torch

from capstan.errors import InputError, unknown_name

DTYPE_NAMES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)


def dtype_name(dtype: torch.dtype) -> str:
    """The name that packets and codec names use: `bfloat16` for `torch.bfloat16`."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_NAMES:
        raise InputError(f"Wanted an element type among {', '.join(DTYPE_NAMES)}; found {name}.")
    return name


def dtype_from_name(name: str) -> torch.dtype:
    """The inverse of `dtype_name`; an unknown name raises `UsageError` and suggests the nearest."""
    if name not in DTYPE_NAMES:
        raise unknown_name("element type", name, DTYPE_NAMES)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def require_floating(codec: str, dtype: torch.dtype) -> None:
    """Raise `InputError` unless `dtype` is a floating-point type."""
    if not dtype.is_floating_point:
        raise InputError(
            f"{codec} wanted floating-point values, found {dtype_name(dtype)}. Use the identity codec."
        )


def num_elements(shape: tuple[int, ...]) -> int:
    """The product of the sizes; 1 for a scalar."""
    return math.prod(shape)
