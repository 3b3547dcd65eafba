"""Where to cut a chain of layers into stages."""

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from capstan.errors import UnsupportedModel, UsageError
from capstan.models import Stage
from capstan.models.balance import balanced_ends
from capstan.transport import Group


def cut(model: nn.Sequential, num_stages: int) -> list[nn.Sequential]:
    """Consecutive layers as stages, such that the costliest stage costs least.

    A layer costs its number of parameters, as matrix products do; looking rows up in an embedding is free.

    Raises:
        UsageError: fewer layers than stages.
        UnsupportedModel: something in the model must not be cut.
    """
    if not isinstance(model, nn.Sequential):
        raise UnsupportedModel(
            f"Only an nn.Sequential can be cut into stages, found {type(model).__name__}: what would cross "
            "is not known. Write the model as a chain of layers, each of one tensor to one tensor."
        )
    if not 1 <= num_stages <= len(model):
        raise UsageError(
            f"A model of {len(model)} layers cannot be cut into {num_stages} stages. Choose 1 to "
            f"{len(model)}."
        )
    ends = balanced_ends([_cost(layer) for layer in model], num_stages)
    layers = [model[index] for index in range(len(model))]  # a layer may be there twice
    stages = [nn.Sequential(*layers[start:end]) for start, end in pairwise([0, *ends])]
    _refuse_shared(stages)
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            raise UnsupportedModel(
                f"{name} is a {type(layer).__name__}: its averages would be of micro-batches, which trains "
                "another model. Use LayerNorm or GroupNorm."
            )
    return stages


def _cost(layer: nn.Module) -> int:
    free = {id(each.weight) for each in layer.modules() if isinstance(each, nn.Embedding)}
    return sum(each.numel() for each in layer.parameters() if id(each) not in free)


def _refuse_shared(stages: Sequence[nn.Module]) -> None:
    owners: dict[int, int] = {}
    for index, stage in enumerate(stages):
        for name, parameter in stage.named_parameters():
            if owners.setdefault(id(parameter), index) != index:
                raise UnsupportedModel(
                    f"Stages {owners[id(parameter)]} and {index} would share {name}, and their copies would "
                    "drift apart. Untie these weights, or use fewer stages."
                )


class ChainShapes:
    """The shapes that pass between stages, found without data: the layers, without their weights."""

    def __init__(self, stages: Sequence[nn.Sequential]) -> None:
        # One layer after another, so that at no time the whole model is there twice.
        self._stages = [[copy.deepcopy(layer).to("meta") for layer in stage] for stage in stages]

    @torch.no_grad()
    def outputs(self, inputs: Tensor) -> list[Tensor]:
        """What each stage gives for such inputs, on the meta device.

        Raises:
            UnsupportedModel: a stage gives no single floating-point tensor with one row a sample.
        """
        values, found = inputs.to("meta"), []
        for index, layers in enumerate(self._stages):
            for layer in layers:
                try:
                    values = layer(values)
                except NotImplementedError as error:
                    raise UnsupportedModel(
                        f"The shapes in stage {index} cannot be told without data ({type(layer).__name__}), "
                        f"so the next stage cannot know what will come: {error}"
                    ) from error
            self._check(index, values, len(inputs))
            found.append(values)
        return found

    def _check(self, index: int, values: object, num_samples: int) -> None:
        if index == len(self._stages) - 1:
            return
        if not isinstance(values, Tensor) or not values.is_floating_point():
            kind = str(values.dtype) if isinstance(values, Tensor) else type(values).__name__
            raise UnsupportedModel(
                f"Between stages {index} and {index + 1} one floating-point tensor must pass, found {kind}. "
                "Cut elsewhere: use another number of stages, or join layers in a module of their own."
            )
        if values.dim() < 2 or len(values) != num_samples:
            raise UnsupportedModel(
                f"Between stages {index} and {index + 1} a row must pass for each of {num_samples} samples, "
                f"found shape {tuple(values.shape)}."
            )


class StageShapes:
    """The shapes that pass between stages of a causal language model.

    Raises:
        UsageError: a rank has another rank's stage; all ranks raise it.
    """

    def __init__(self, stage: Stage, group: Group) -> None:
        found = group.gather([stage.cut.index, stage.cut.num_stages])
        wanted = [[rank, group.size] for rank in range(group.size)]
        if found != wanted:
            has = ", ".join(f"{index} of {count}" for index, count in found)
            raise UsageError(
                f"{group.size} ranks need stages 0 to {group.size - 1} of {group.size}, found {has}. Cut the "
                "model into as many stages as there are ranks, and give each rank the stage of its number."
            )
        self._stage, self._num_stages = stage, group.size

    def outputs(self, inputs: Tensor) -> list[Tensor]:
        """What each stage gives for such token ids, on the meta device."""
        dtype = next(self._stage.parameters()).dtype
        widths = [self._stage.hidden_size] * (self._num_stages - 1) + [self._stage.vocabulary_size]
        return [torch.empty(*inputs.shape, width, dtype=dtype, device="meta") for width in widths]
