"""A statistic: what is measured, on what, and the sums from which mean and spread follow."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from capstan.evaluation.instances import Instance, PerturbationDescription


class Context(NamedTuple):
    """Which instances a statistic is over."""

    split: str | None = None
    sub_split: str | None = None
    perturbation: PerturbationDescription | None = None

    @classmethod
    def of(cls, instance: Instance) -> "Context":
        """The context an instance belongs to."""
        return cls(instance.split, instance.sub_split, instance.perturbation)


NOWHERE = Context()


@dataclass(frozen=True)
class StatName:
    """A metric's name and the instances it is over."""

    name: str
    context: Context = NOWHERE

    def to_dict(self) -> dict[str, Any]:
        """As it stands in HELM's stats.json."""
        own: dict[str, Any] = {"name": self.name}
        for part in ("split", "sub_split"):
            if getattr(self.context, part) is not None:
                own[part] = getattr(self.context, part)
        if self.context.perturbation is not None:
            own["perturbation"] = self.context.perturbation.to_dict()
        return own


@dataclass
class Stat:
    """Values added up. `variance` and `stddev` are of the population, as in HELM."""

    name: StatName
    count: int = 0
    sum: float = 0
    sum_squared: float = 0
    min: float | None = None
    max: float | None = None

    def add(self, value: float | bool | None) -> Self:
        """Count one more value; None is not a value."""
        if value is None:
            return self
        value = int(value) if isinstance(value, bool) else value
        return self.merge(Stat(self.name, 1, value, value * value, value, value))

    def merge(self, other: "Stat") -> Self:
        """Count all values of another statistic."""
        if other.count:
            self.min = other.min if self.min is None else min(self.min, other.min)  # type: ignore[type-var]
            self.max = other.max if self.max is None else max(self.max, other.max)  # type: ignore[type-var]
        self.count += other.count
        self.sum += other.sum
        self.sum_squared += other.sum_squared
        return self

    @property
    def mean(self) -> float | None:
        """The mean, or None of nothing."""
        return self.sum / self.count if self.count else None

    @property
    def variance(self) -> float | None:
        """The population's variance."""
        if not self.count:
            return None
        return max(0.0, self.sum_squared / self.count - (self.sum / self.count) ** 2)

    def only_mean(self) -> "Stat":
        """One value, the mean: what a trial counts for."""
        return self if self.count == 0 else Stat(self.name).add(self.mean)

    def in_context(self, context: Context) -> "Stat":
        """The same values under a context."""
        return replace(self, name=StatName(self.name.name, context))

    def to_dict(self) -> dict[str, Any]:
        """As it stands in HELM's stats.json; what is None is left out."""
        own: dict[str, Any] = {"name": self.name.to_dict(), "count": self.count, "sum": self.sum}
        own["sum_squared"] = self.sum_squared
        if self.count:
            variance = self.variance or 0.0
            own |= {"min": self.min, "max": self.max, "mean": self.mean}
            own |= {"variance": variance, "stddev": math.sqrt(variance)}
        return own


def stat(name: str, value: float | bool | None) -> Stat:
    """A statistic of one value."""
    return Stat(StatName(name)).add(value)


def merge_into(stats: dict[StatName, Stat], more: Stat) -> None:
    """Add a statistic to those of the same name."""
    if more.name in stats:
        stats[more.name].merge(more)
    else:
        stats[more.name] = replace(more)


def merged(stats: Iterable[Stat]) -> dict[StatName, Stat]:
    """All statistics, those of the same name merged."""
    found: dict[StatName, Stat] = {}
    for each in stats:
        merge_into(found, each)
    return found
