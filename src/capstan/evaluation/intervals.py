"""How sure a mean is: intervals over instances, and stopping when they are narrow enough.

    Wilson: (p + z²/2n ± z √(p (1 − p) / n + z²/4n²)) / (1 + z²/n)

Source: Efron 1979, the percentile bootstrap; instances are drawn with replacement, all values of one instance
(its trials) together, and all instances of one passage. Wilson 1927 where answers are right or wrong, and
where all values are the same number from 0 to 1: draws of them never differ, so a bootstrap would call a mean
known after two.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from capstan.evaluation.metrics import InstanceStats, Measurement

NUM_RESAMPLES = 2000
LEVEL = 0.95
_DRAWS_IN_TAIL = 40  # of the resamples at the least that lie beyond the interval


class Interval(NamedTuple):
    """A mean with its interval, of 95 % unless another level was asked for, over so many instances."""

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


def level_of_look(look: int, level: float = LEVEL) -> float:
    """The level of the interval at the first, second … look at growing data.

        1 - level_k = (1 - level) / (k (k + 1))

    The shares that may be wrong sum to 1 - level over all looks, so that with this probability every one of
    the intervals holds the mean, also that at which one stops because it is narrow.

    Source: alpha spending (Lan & DeMets 1983) by the union bound, which needs nothing of how looks depend.
    """
    return 1 - (1 - level) / (look * (look + 1))


def bootstrap(
    values: Sequence[float],
    *,
    clusters: Sequence[str] | None = None,
    level: float = LEVEL,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The interval of the mean of values that are independent, or of those in `clusters` that are; of fewer
    than two it is everything.

    Shares of right answers, and equal values from 0 to 1, have Wilson's interval.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) > 1 and (np.isin(x, (0.0, 1.0)).all() or (0 <= x.min() == x.max() <= 1)):
        return wilson(float(x.mean()), effective_num(x, clusters), level)._replace(num=len(x))
    return resampled(values, clusters=clusters, level=level, num_resamples=num_resamples, seed=seed)


def effective_num(values: NDArray[np.float64], clusters: Sequence[str] | None) -> float:
    """How many independent answers tell as much as these: n over the variance that clusters add.

    Where all are alike that cannot be seen, and a cluster counts as one answer.

    Source: Kish 1965, the design effect; Miller 2024 (arXiv 2411.00640), section 2.2, the clustered variance.
    """
    if clusters is None or (num_clusters := len(set(clusters))) == len(values):
        return len(values)
    mean = float(values.mean())
    if values.min() == values.max() or num_clusters == 1:
        return num_clusters
    rest: dict[str, float] = defaultdict(float)
    for cluster, value in zip(clusters, values, strict=True):
        rest[cluster] += float(value) - mean
    effect = sum(each * each for each in rest.values()) / float(((values - mean) ** 2).sum())
    return len(values) / max(1.0, effect)


def resampled(
    values: Sequence[float],
    *,
    clusters: Sequence[str] | None = None,
    level: float = LEVEL,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The percentile bootstrap's interval of the mean, whole clusters drawn; of less than two, all."""
    x = np.asarray(values, dtype=np.float64)
    mean = float(x.mean()) if len(x) else 0.0
    names = range(len(x)) if clusters is None else clusters
    number = {name: at for at, name in enumerate(dict.fromkeys(names))}
    owner = np.array([number[name] for name in names], dtype=np.int64)
    sizes = np.bincount(owner).astype(np.float64)
    if len(sizes) < 2:
        return Interval(mean, -np.inf, np.inf, len(x))
    totals = np.bincount(owner, weights=x)
    num_resamples = max(num_resamples, math.ceil(_DRAWS_IN_TAIL / (1 - level)))
    rng = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    block = max(1, 4_000_000 // len(sizes))  # so that no more than some 32 MB of draws are held
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        drawn = rng.integers(len(sizes), size=(size, len(sizes)))
        means[start : start + size] = totals[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), len(x))


def wilson(share: float, num: float, level: float = LEVEL) -> Interval:
    """The interval of a share of `num` answers."""
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    middle = (share + z2 / (2 * num)) / (1 + z2 / num)
    half = math.sqrt(z2 * (share * (1 - share) / num + z2 / (4 * num**2))) / (1 + z2 / num)
    # At 0 and 1 the nearer end is exact but for rounding.
    low, high = max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))
    return Interval(share, low, high, round(num))


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


def passages_of(texts: Mapping[str, str]) -> dict[str, str]:
    """By each instance's key, from its text, what it shares with others asked about the same passage: all
    that stands before its last question, else its own key. What all share is no passage but a way to ask.
    """
    before = {key: text.rpartition("Question: ")[0].strip() for key, text in texts.items()}
    common = len(set(before.values())) == 1
    return {key: key if common or not passage else passage for key, passage in before.items()}


def interval_of(
    measurement: Measurement, name: str, split: str | None = None, *, level: float = LEVEL
) -> Interval | None:
    """A metric's interval over unperturbed instances, those of a passage together; None where none has it."""
    found = instance_means(measurement.per_instance, name, split)
    if not found:
        return None
    instances = (each.instance for each in measurement.per_instance)
    passages = passages_of({str(each.id): each.input for each in instances if each.perturbation is None})
    clusters = [passages[key] for key in found]
    return bootstrap(list(found.values()), clusters=clusters, level=level)
