"""Layers from their names in a configuration; sizes that follow from the layers before are not asked for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from capstan.errors import InputError, unknown_name

LayerText = str | Mapping[str, Any]


def _linear(shape: tuple[int, ...], out: int) -> nn.Module:
    return nn.Linear(shape[-1], out)


def _conv(dims: int) -> Callable[..., nn.Module]:
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]

    def make(shape: tuple[int, ...], out: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Module:
        return kind(shape[0], out, kernel, stride=stride, padding=padding)

    return make


def _group_norm(shape: tuple[int, ...], groups: int) -> nn.Module:
    return nn.GroupNorm(groups, shape[0])


# (the shape of one sample, what the configuration says) -> the layer
KINDS: dict[str, Callable[..., nn.Module]] = {
    "linear": _linear,
    "conv1d": _conv(1),
    "conv2d": _conv(2),
    "relu": lambda shape: nn.ReLU(),
    "gelu": lambda shape: nn.GELU(),
    "tanh": lambda shape: nn.Tanh(),
    "flatten": lambda shape: nn.Flatten(),
    "dropout": lambda shape, rate: nn.Dropout(rate),
    "reshape": lambda shape, to: nn.Unflatten(1, to),
    "max_pool1d": lambda shape, kernel: nn.MaxPool1d(kernel),
    "max_pool2d": lambda shape, kernel: nn.MaxPool2d(kernel),
    "average_to1d": lambda shape, out: nn.AdaptiveAvgPool1d(out),
    "average_to2d": lambda shape, out: nn.AdaptiveAvgPool2d(out),
    "batch_norm1d": lambda shape: nn.BatchNorm1d(shape[0]),
    "batch_norm2d": lambda shape: nn.BatchNorm2d(shape[0]),
    "group_norm": _group_norm,
}


def build_layers(
    texts: Sequence[LayerText], sample_shape: tuple[int, ...], *, seed: int
) -> tuple[list[nn.Module], list[tuple[int, ...]]]:
    """The layers, and the shape of one sample after each.

    Raises:
        UsageError: a kind of layer is unknown.
        InputError: a layer lacks something, has too much, or does not go with the shape before it.
    """
    layers, shapes, shape = [], [], sample_shape
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for number, text in enumerate(texts):
            kind, settings = _read(text, number)
            if kind not in KINDS:
                raise unknown_name("layer", kind, KINDS)
            try:
                layer = KINDS[kind](shape, **settings)
                outcome: Tensor = layer.eval()(torch.zeros(1, *shape))
            except (TypeError, ValueError, RuntimeError, IndexError) as error:
                raise InputError(
                    f"Layer {number}, {kind} with {settings or 'nothing more'}, does not go with samples of "
                    f"the shape {shape}: {error}"
                ) from error
            shape = tuple(outcome.shape[1:])
            layers.append(layer.train())
            shapes.append(shape)
    return layers, shapes


def _read(text: LayerText, number: int) -> tuple[str, dict[str, Any]]:
    if isinstance(text, str):
        return text, {}
    if len(text) != 1:
        raise InputError(
            f"Layer {number} is one kind with its settings, as conv2d: {{out: 32, kernel: 3}}; found {text}."
        )
    ((kind, settings),) = text.items()
    if not isinstance(settings, Mapping):
        raise InputError(
            f"Layer {number}: {kind} wants settings by name, as {{out: 32}}; found {settings!r}."
        )
    return kind, dict(settings)
