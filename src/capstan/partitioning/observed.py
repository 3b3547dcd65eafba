"""Run times of one job under several layouts: which tables matter to it, and what it takes under each.

A job depends on few tables. Of all sets of at most two tables, the one is taken whose settings say most
about the seconds: each run is predicted by the median of the other runs with the same settings, and a larger
set must err by a fifth less than a smaller one. Layouts that were not tried are thus predicted from runs that
agree in what matters; settings never seen count as the worst that was. Where few runs leave it open which
tables matter, every set that may be it is asked, and the slowest answer counts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from capstan.partitioning.history import JobRun

_MUST_ERR_LESS = 0.8
# A set may be the right one if it errs by no more than this, over the root of the number of runs.
_MAY_ERR_MORE = 3.0
Layout = Mapping[str, str]
Settings = tuple[str | None, ...]


@dataclass(frozen=True)
class Medians:
    """The median seconds and the number of runs under each setting of `tables`; the mean absolute error."""

    tables: tuple[str, ...]
    seconds: Mapping[Settings, float]
    num_runs: Mapping[Settings, int]
    error_s: float

    def predict(self, layout: Layout) -> float:
        """Seconds under a layout; the worst that was seen where its settings were never tried."""
        return self.seconds.get(_settings(layout, self.tables), max(self.seconds.values()))


@dataclass(frozen=True)
class Observed:
    """What the seconds of a job depend on: the likeliest tables first, then what it may be as well."""

    likeliest: Medians
    others: tuple[Medians, ...]

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that matter."""
        return self.likeliest.tables

    def predict(self, layout: Layout) -> float:
        """Seconds under a layout, at worst of what is likely."""
        likeliest = self.likeliest.predict(layout)
        return max([likeliest, *(each.predict(layout) for each in self.others)]) if layout else likeliest

    def doubt_s(self, layout: Layout) -> float:
        """By how much that may be wrong: twice the error of a run, less for a median of many.

        error_s * 2 / sqrt(num_runs), as for a mean; a run's average error stands for its deviation.
        """
        settings = _settings(layout, self.tables)
        return 2 * self.likeliest.error_s / math.sqrt(self.likeliest.num_runs.get(settings, 1))


def observe(runs: Sequence[JobRun]) -> Observed:
    """Find what the seconds of one job's runs depend on."""
    tables = sorted({table for run in runs for table in run.layout})
    nothing = _medians(runs, ())
    known = {size: [_medians(runs, each) for each in combinations(tables, size)] for size in (1, 2)}
    best = nothing
    for size in (1, 2):
        least = min(known[size], key=lambda each: each.error_s, default=best)
        if least.error_s < _MUST_ERR_LESS * best.error_s:
            best = least
    if best is nothing:
        return Observed(likeliest=best, others=())
    bearable = best.error_s * (1 + _MAY_ERR_MORE / math.sqrt(len(runs)))
    others = [
        each for size in (1, 2) for each in known[size] if each.error_s <= bearable and each is not best
    ]
    return Observed(likeliest=best, others=tuple(others))


def _medians(runs: Sequence[JobRun], tables: tuple[str, ...]) -> Medians:
    groups: dict[Settings, list[float]] = {}
    for run in runs:
        groups.setdefault(_settings(run.layout, tables), []).append(run.seconds)
    everything = median(run.seconds for run in runs)
    errors = [error for group in groups.values() for error in _errors(sorted(group), everything)]
    return Medians(
        tables=tables,
        seconds={settings: median(group) for settings, group in groups.items()},
        num_runs={settings: len(group) for settings, group in groups.items()},
        error_s=sum(errors) / len(errors),
    )


def _settings(layout: Layout, tables: Sequence[str]) -> Settings:
    return tuple(layout.get(table) for table in tables)


def _errors(ordered: list[float], everything: float) -> Iterator[float]:
    """Each run's distance from the median of the others of its group; alone, from that of all runs."""
    for place, seconds in enumerate(ordered):
        others = ordered[:place] + ordered[place + 1 :]
        yield abs(seconds - (_middle(others) if others else everything))


def _middle(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
