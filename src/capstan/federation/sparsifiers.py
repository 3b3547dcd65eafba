"""Which elements of a batch of activations are sent. NumPy only.

    top-k         the k largest absolute values, of each sample or of the whole batch; of equal ones the first
    threshold     all above a value: one comparison an element, for microcontrollers
    random top-k  of k chosen, each is with probability alpha one that is not among the k largest

Source: top-k, Yuan et al., arXiv 2005.05083; random top-k, Zheng et al., arXiv 2305.18469.
Differs: the paper does not say whether k is counted per sample; here it is, unless `per="tensor"`.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from capstan.errors import InputError, UsageError
from capstan.federation.index_codes import IndexSpace, Positions

Floats = NDArray[np.floating[Any]]


class Sparsifier(Protocol):
    """Chooses what is kept of (samples, width) values."""

    def space(self, rows: int, width: int) -> IndexSpace | None:
        """How many elements are kept and how they are spread, or None where values decide it."""

    def choose(self, values: Floats, rng: np.random.Generator) -> Positions:
        """Rising flat positions of what is kept."""


@dataclass(frozen=True, kw_only=True)
class TopK:
    """floor(keep d) elements of each sample of d elements, or floor(keep n) of a batch of n; at least one."""

    keep: float
    per: Literal["sample", "tensor"] = "sample"

    def __post_init__(self) -> None:
        _check_fraction("keep", self.keep)
        if self.per not in ("sample", "tensor"):
            raise UsageError(f"per must be sample or tensor, found {self.per!r}.")

    def space(self, rows: int, width: int) -> IndexSpace:
        if self.per == "sample":
            return IndexSpace(rows, width, rows * _count(self.keep, width), rows > 0 and width > 0)
        return IndexSpace(rows, width, _count(self.keep, rows * width))

    def choose(self, values: Floats, rng: np.random.Generator) -> Positions:
        return np.flatnonzero(_largest(_sizes(values), self.keep, self.per))


@dataclass(frozen=True, kw_only=True)
class RandomTopK:
    """As `TopK` per sample, but m of the k, m binomial (k, alpha), are any others, each as likely."""

    keep: float
    alpha: float

    def __post_init__(self) -> None:
        _check_fraction("keep", self.keep)
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha must be from 0 to 1, found {self.alpha}.")

    def space(self, rows: int, width: int) -> IndexSpace:
        return TopK(keep=self.keep).space(rows, width)

    def choose(self, values: Floats, rng: np.random.Generator) -> Positions:
        sizes = _sizes(values)
        top = _largest(sizes, self.keep, "sample")
        rows, width = sizes.shape
        kept = _count(self.keep, width)
        others = np.minimum(rng.binomial(kept, self.alpha, rows), width - kept)
        keys = rng.random(sizes.shape)
        # The order of random keys among the largest, then among the others.
        ranks = np.argsort(np.argsort(np.where(top, keys, 1 + keys), axis=1), axis=1)
        wanted = np.where(top, ranks < (kept - others)[:, None], ranks - kept < others[:, None])
        return np.flatnonzero(wanted)


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Elements whose absolute value is above `above`."""

    above: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.above) and self.above >= 0):
            raise UsageError(f"A threshold must be finite and not negative, found {self.above}.")

    def space(self, rows: int, width: int) -> None:
        return None

    def choose(self, values: Floats, rng: np.random.Generator) -> Positions:
        return np.flatnonzero(_sizes(values) > self.above)


@dataclass(kw_only=True)
class ErrorFeedback:
    """What was not sent is added to what is chosen from next time, for each sender under its key.

        sent_t = keep(value_t + rest_{t-1}),   rest_t = value_t + rest_{t-1} - sent_t

    For gradients that are sparsified by themselves. A batch of another size starts with no rest: the rest of
    a sample belongs to its place in the batch.

    Source: Stich et al., arXiv 1809.07599.
    """

    rests: dict[object, Floats] = field(default_factory=dict)

    def add_rest(self, key: object, values: Floats) -> Floats:
        """`values` and what was not sent before under `key`."""
        rest = self.rests.get(key)
        return values if rest is None or rest.shape != values.shape else values + rest

    def keep_rest(self, key: object, values: Floats, sent: Floats) -> None:
        """Note that `sent` is what the receiver got of `values`."""
        self.rests[key] = values - sent


def _check_fraction(name: str, fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise UsageError(f"{name} must be above 0 and at most 1, found {fraction}.")


def _count(keep: float, elements: int) -> int:
    # 1e-9: 0.29 * 100 is a little less than 29.
    return min(elements, max(1, math.floor(keep * elements + 1e-9)))


def _sizes(values: Floats) -> Floats:
    if values.ndim != 2:
        raise InputError(f"Wanted values of (samples, width), found the shape {values.shape}.")
    sizes = np.abs(values)
    if not np.isfinite(sizes).all():
        raise InputError("Only finite numbers cross the cut, found NaN or infinity: training has diverged.")
    return sizes


def _largest(sizes: Floats, keep: float, per: str) -> NDArray[np.bool_]:
    flat = sizes if per == "sample" else sizes.reshape(1, -1)
    if not flat.size:
        return np.zeros(sizes.shape, np.bool_)
    kept = _count(keep, flat.shape[1])
    least = np.partition(flat, -kept, axis=1)[:, -kept, None]
    above, equal = flat > least, flat == least
    missing = kept - above.sum(axis=1, keepdims=True)
    chosen: NDArray[np.bool_] = above | (equal & (np.cumsum(equal, axis=1) <= missing))
    return chosen.reshape(sizes.shape)
