"""Element-wise functions by name, each with the function that is its derivative."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from capstan.errors import unknown_name
from capstan.relations.arrays import Array, is_torch


@dataclass(frozen=True, kw_only=True)
class ElementwiseMap:
    """`function(module, array)` with NumPy or torch as the module; `derivative` names another map."""

    name: str
    function: Callable[[Any, Array], Array] = field(repr=False)
    derivative: str | None

    def __call__(self, array: Array) -> Array:
        module: ModuleType = sys.modules["torch"] if is_torch(array) else np
        return self.function(module, array)


def _sigmoid(module: Any, array: Array) -> Array:
    # Through tanh, which overflows for no argument.
    return module.tanh(array * 0.5) * 0.5 + 0.5


def _relu(module: Any, array: Array) -> Array:
    return module.clamp(array, min=0) if is_torch(array) else np.maximum(array, 0)


def _step(_: Any, array: Array) -> Array:
    positive = array > 0
    return positive.to(array.dtype) if is_torch(array) else positive.astype(array.dtype)


def _sigmoid_slope(module: Any, array: Array) -> Array:
    value = _sigmoid(module, array)
    return value * (1 - value)


def _tanh_slope(module: Any, array: Array) -> Array:
    return 1 - module.tanh(array) ** 2


_ALL = (
    ElementwiseMap(name="relu", function=_relu, derivative="step"),
    ElementwiseMap(name="step", function=_step, derivative="zero"),
    ElementwiseMap(name="zero", function=lambda module, x: module.zeros_like(x), derivative="zero"),
    ElementwiseMap(name="exp", function=lambda module, x: module.exp(x), derivative="exp"),
    ElementwiseMap(name="negative", function=lambda _, x: -x, derivative="minus-one"),
    ElementwiseMap(name="minus-one", function=lambda module, x: module.full_like(x, -1), derivative="zero"),
    ElementwiseMap(name="square", function=lambda _, x: x * x, derivative="double"),
    ElementwiseMap(name="double", function=lambda _, x: x + x, derivative="two"),
    ElementwiseMap(name="two", function=lambda module, x: module.full_like(x, 2), derivative="zero"),
    ElementwiseMap(name="sigmoid", function=_sigmoid, derivative="sigmoid-slope"),
    ElementwiseMap(name="sigmoid-slope", function=_sigmoid_slope, derivative=None),
    ElementwiseMap(name="tanh", function=lambda module, x: module.tanh(x), derivative="tanh-slope"),
    ElementwiseMap(name="tanh-slope", function=_tanh_slope, derivative=None),
)
ELEMENTWISE: Mapping[str, ElementwiseMap] = {each.name: each for each in _ALL}


def elementwise_named(name: str) -> ElementwiseMap:
    """The function called `name`.

    Raises:
        UsageError: there is none.
    """
    if name not in ELEMENTWISE:
        raise unknown_name("element-wise function", name, ELEMENTWISE)
    return ELEMENTWISE[name]
