"""How sure a mean is: intervals over instances, and stopping when they are narrow enough.

    Wilson: (p + z²/2n ± z √(p (1 − p) / n + z²/4n²)) / (1 + z²/n)

Source: Efron 1979, the percentile bootstrap; instances are drawn with replacement, all values of one instance
(its trials) together. Wilson 1927 where answers are right or wrong, and where all values are the same number
from 0 to 1: draws of them never differ, so a bootstrap would call a mean known after two.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from capstan.evaluation.metrics import InstanceStats, Measurement

NUM_RESAMPLES = 2000
_LEVEL = 0.95


class Interval(NamedTuple):
    """A mean with its 95 % interval over so many instances."""

    mean: float
    low: float
    high: float
    num: int

    @property
    def half_width(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2

    def to_dict(self) -> dict[str, float | int]:
        """Plain data."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "count": self.num}


def bootstrap(values: Sequence[float], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Interval:
    """The interval of the mean of independent values; of fewer than two it is everything.

    Shares of right answers, and equal values from 0 to 1, have Wilson's interval.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) > 1 and (np.isin(x, (0.0, 1.0)).all() or (0 <= x.min() == x.max() <= 1)):
        return wilson(float(x.mean()), len(x))
    return resampled(values, num_resamples=num_resamples, seed=seed)


def resampled(values: Sequence[float], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Interval:
    """The percentile bootstrap's interval of the mean; of fewer than two values it is everything."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return Interval(float(x.mean()) if len(x) else 0.0, -np.inf, np.inf, len(x))
    rng = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    block = max(1, 4_000_000 // len(x))  # so that no more than some 32 MB of draws are held
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        means[start : start + size] = x[rng.integers(len(x), size=(size, len(x)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Interval(float(x.mean()), float(low), float(high), len(x))


def wilson(share: float, num: int) -> Interval:
    """The 95 % interval of a share of `num` answers."""
    z2 = NormalDist().inv_cdf((1 + _LEVEL) / 2) ** 2
    middle = (share + z2 / (2 * num)) / (1 + z2 / num)
    half = math.sqrt(z2 * (share * (1 - share) / num + z2 / (4 * num**2))) / (1 + z2 / num)
    # At 0 and 1 the nearer end is exact but for rounding.
    return Interval(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)), num)


def instance_means(
    per_instance: Sequence[InstanceStats], name: str, split: str | None = None
) -> dict[str, float]:
    """The mean of a metric on each unperturbed instance over its trials, by id."""
    values: dict[str, list[float]] = defaultdict(list)
    for each in per_instance:
        if each.instance.perturbation is not None or (split and each.instance.split != split):
            continue
        for stat in each.stats:
            if stat.name.name == name and stat.mean is not None:
                values[str(each.instance.id)].append(stat.mean)
    return {key: sum(found) / len(found) for key, found in values.items()}


def interval_of(measurement: Measurement, name: str, split: str | None = None) -> Interval | None:
    """A metric's interval over unperturbed instances, or None where no instance has it."""
    values = list(instance_means(measurement.per_instance, name, split).values())
    return bootstrap(values) if values else None
