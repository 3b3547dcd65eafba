"""The grid of one group: its levels, the stored numbers that place them, and the code of each value."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from capstan.codecs.stochastic import uniform
from capstan.errors import InputError

# Groups are read within +-2**126, so that neither their range nor any of their levels overflows float32.
LARGEST = 2.0**126

LARGEST_LEVEL = 2.0**127
"""No level of a grid lies beyond: 2**126 and what rounding the step up adds."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Levels lowest .. highest, `step` apart; asymmetric grids begin at `low`, symmetric ones surround 0.

    The stored numbers of a group are (low, step), or (step,) where symmetric, as a row of `dtype`. Values are
    float32 (groups, elements), and every operation on them is one IEEE operation, so that devices agree.
    """

    num_bits: int
    symmetric: bool
    dtype: torch.dtype

    @property
    def lowest(self) -> int:
        return -self.highest if self.symmetric else 0

    @property
    def highest(self) -> int:
        return (1 << self.num_bits - self.symmetric) - 1

    @property
    def num_numbers(self) -> int:
        return 1 if self.symmetric else 2

    def fit(self, values: Tensor) -> Tensor:
        """The stored numbers (groups, 1 or 2) of every group."""
        # Adding 0 makes every zero positive: of two zeros, devices differ in which is the smaller.
        low, high = values.amin(-1, keepdim=True).add_(0.0), values.amax(-1, keepdim=True).add_(0.0)
        largest = torch.maximum(-low, high)
        is_finite = largest < math.inf  # false for NaN too
        if values.device.type == "cpu" and not is_finite.all():
            found = values[~values.isfinite()][0].item()
            raise InputError(
                f"Only values that are finite in float32 can be quantised, found {found}. Use a cast there."
            )
        numbers = self._fit_symmetric(largest) if self.symmetric else self._fit_asymmetric(low, high)
        return numbers if values.device.type == "cpu" else numbers.masked_fill_(~is_finite, math.nan)

    def positions(self, values: Tensor, numbers: Tensor) -> Tensor:
        """The position of every value on its group's grid in float32, before rounding, within the grid."""
        low, step = self._split(numbers)
        step = step.masked_fill(step == 0, 1)
        positions = values / step if low is None else values.sub(low).div_(step)
        return positions.clamp_(self.lowest, self.highest)

    def values(self, codes: Tensor, numbers: Tensor, out: Tensor) -> None:
        """Write the value of every stored code (uint8) into `out`, float32."""
        low, step = self._split(numbers)
        out.copy_(codes)
        if low is None:
            out.add_(self.lowest).mul_(step)
        else:
            out.mul_(step).add_(low)

    def _split(self, numbers: Tensor) -> tuple[Tensor | None, Tensor]:
        numbers = numbers.to(torch.float32)
        return (None, numbers) if self.symmetric else (numbers[:, :1], numbers[:, 1:])

    def _fit_asymmetric(self, low: Tensor, high: Tensor) -> Tensor:
        limit = min(torch.finfo(self.dtype).max, LARGEST)
        stored_low = _round_down(low.clamp(-limit, LARGEST), self.dtype)
        # A group that lies below every number of the type has no span, not a negative one.
        span = high.clamp(-LARGEST, LARGEST).sub_(stored_low.to(torch.float32)).clamp_(min=0)
        return torch.cat((stored_low, self._step(span)), -1)

    def _fit_symmetric(self, largest: Tensor) -> Tensor:
        return self._step(largest.clamp(max=LARGEST))

    def _step(self, span: Tensor) -> Tensor:
        """The smallest `dtype` number, or the one after it, of which `highest` cover the span.

        It saturates at the largest `dtype` number, and is 0 only for a span of 0: a small range may end in
        few levels, never in one.
        """
        # A tensor, since dividing by a Python number multiplies by its rounded inverse on some devices.
        highest = torch.full_like(span, self.highest)
        step = (span / highest).to(self.dtype)
        is_short = step.to(torch.float32) * highest < span
        step = torch.where(is_short, _next_up(step), step)
        return step.clamp_(max=torch.finfo(self.dtype).max)


def nearest(positions: Tensor) -> Tensor:
    """Round to the nearest integer, ties to even, in place."""
    return positions.round_()


def stochastic(positions: Tensor, *, seed: int, first: int) -> Tensor:
    """Round up with a probability equal to the fraction, else down; in place of the positions.

    The fraction is exact in float32 and compared with a multiple of 2**-24, so the expected code is the
    position, to 2**-24 of a step.
    """
    chance = uniform(seed, first, positions.numel(), positions.device).view(positions.shape)
    floors = positions.floor()
    return floors.add_(chance < positions.sub_(floors))


def _round_down(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest `dtype` number that is at most the value."""
    rounded = values.to(dtype)
    numbers = rounded.view(_integers(dtype))
    # Of one sign, magnitudes are ordered as their bits. A zero above its value is a negative zero.
    below = torch.where(rounded > 0, numbers - 1, numbers + 1)
    return torch.where(rounded.to(torch.float32) > values, below, numbers).view(dtype)


def _next_up(values: Tensor) -> Tensor:
    """The next number above, of numbers that are not negative."""
    return (values.view(_integers(values.dtype)) + 1).view(values.dtype)


def _integers(dtype: torch.dtype) -> torch.dtype:
    return torch.int32 if dtype.itemsize == 4 else torch.int16
