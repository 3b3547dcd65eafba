"""Where a chain of layers cannot be cut, and what is said of it."""

import pytest
import torch
from torch import nn

from capstan.errors import UnsupportedModel
from capstan.pipelining.cutting import ChainShapes


class OnlyPositive(nn.Module):
    def forward(self, values):
        return values[values > 0]


class Unwritten(nn.Module):
    """A module that never got a `forward`."""


@pytest.mark.parametrize(
    ("layer", "says"),
    [(OnlyPositive(), "stage 1 .*OnlyPositive"), (Unwritten(), 'Unwritten.* missing the required "forward"')],
)
def test_a_layer_whose_shapes_cannot_be_told_is_named_with_the_reason(layer, says):
    shapes = ChainShapes([nn.Sequential(nn.Linear(3, 3)), nn.Sequential(layer)])
    with pytest.raises(UnsupportedModel, match=says):
        shapes.outputs(torch.ones(2, 3))
