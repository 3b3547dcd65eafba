"""What a layout would cost and save, predicted for every job of a history.

A job that ran under several layouts is predicted from those runs (`observed`), any other from its parts:

    seconds = seconds now - shuffle_s        where all its sides lie by its keys
    seconds = seconds now * (1 + SCATTERED)  where a side lies by another key, or only some sides by its keys
    total   = sum over jobs + size_bytes * WRITE_PASSES / write_bytes_per_s / expected_runs of tables moved

Source: Lachesis, arXiv 2006.16529: both sides by their keys make a local join, one alone shuffles as before.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from capstan.hardware import Machine
from capstan.partitioning.history import JobRun, Side
from capstan.partitioning.observed import Layout, Observed, observe

# Assumed, not measured: files cut by a key that a job does not use are read in another order and in smaller
# pieces. It keeps a layout from being chosen for a table that gains nothing by it.
SCATTERED = 0.05
# A layout is a table read once and written once.
WRITE_PASSES = 2


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a byte takes: to be shuffled, and to be written; None where nobody measured it."""

    shuffle_bytes_per_s: float | None = None
    write_bytes_per_s: float | None = None
    source: str = "nothing measured"

    @classmethod
    def of_machine(cls, machine: Machine) -> "Rates":
        """Through the machine's disk: shuffled bytes are written and read again."""
        write = machine.link("host", "disk").bandwidth_bytes_per_s
        read = machine.link("disk", "host").bandwidth_bytes_per_s
        return cls(
            shuffle_bytes_per_s=1 / (1 / write + 1 / read),
            write_bytes_per_s=write,
            source=f"disk of {machine.name}",
        )

    @classmethod
    def of_runs(cls, runs: Sequence[JobRun]) -> "Rates":
        """The median over recorded jobs whose shuffles were timed: a layout is written as a shuffle is."""
        rates = [run.shuffle_bytes / run.shuffle_s for run in runs if run.shuffle_s and run.shuffle_bytes]
        if not rates:
            return cls()
        return cls(
            shuffle_bytes_per_s=median(rates),
            write_bytes_per_s=median(rates) * WRITE_PASSES,
            source=f"{len(rates)} recorded shuffles",
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """All runs of one name: how often, and what it takes now."""

    name: str
    runs: int
    now_s: float
    sides: tuple[Side, ...]
    shuffle_s: float
    observed: Observed | None

    def seconds(self, layout: Layout) -> float:
        """Predicted seconds of one run under a layout."""
        if self.observed is not None:
            return self.observed.predict(layout)
        placed = [side for side in self.sides if side.table in layout]
        if not placed:
            return self.now_s
        if all(layout.get(side.table) == side.key and side.is_reusable for side in self.sides):
            return self.now_s - self.shuffle_s
        return self.now_s * (1 + SCATTERED)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The jobs of a history, the keys that each table could lie by, and what moving a table takes."""

    jobs: tuple[Job, ...]
    candidates: Mapping[str, tuple[str, ...]]
    write_s: Mapping[str, float] = field(default_factory=dict)
    key_texts: Mapping[str, str] = field(default_factory=dict)
    expected_runs: int = 10

    def seconds(self, layout: Layout) -> float:
        """Predicted seconds of all recorded runs, with each moved table's share of its writing."""
        jobs = sum(job.seconds(layout) * job.runs for job in self.jobs)
        return jobs + sum(self.write_s.get(table, 0.0) for table in layout) / self.expected_runs

    def doubt_s(self, one: Layout, other: Layout) -> float:
        """By how much the difference of two layouts' seconds may be wrong, for what was measured of them."""
        doubts = [
            job.observed.doubt_s(layout) * job.runs
            for job in self.jobs
            if job.observed is not None and job.seconds(one) != job.seconds(other)
            for layout in (one, other)
        ]
        return math.hypot(*doubts)

    @property
    def num_layouts(self) -> int:
        """All combinations of candidates, with none for each table."""
        count = 1
        for keys in self.candidates.values():
            count *= len(keys) + 1
        return count


def workload(
    runs: Sequence[JobRun], rates: Rates, *, most_keys: int = 3, expected_runs: int = 10
) -> Workload:
    """Gather runs into jobs, and their keys into candidates: the `most_keys` most frequent of each table."""
    names = list(dict.fromkeys(run.name for run in runs))
    uses: dict[str, Counter[str]] = {}
    sizes: dict[str, int] = {}
    texts: dict[str, str] = {}
    for run in runs:
        for table, key in run.layout.items():
            uses.setdefault(table, Counter())[key] += 1
        for side in run.sides:
            if side.is_reusable:
                uses.setdefault(side.table, Counter())[side.key] += 1
            texts[side.key] = side.key_text
            sizes[side.table] = max(sizes.get(side.table, 0), side.size_bytes)
    writing = rates.write_bytes_per_s
    return Workload(
        jobs=tuple(_job([run for run in runs if run.name == name], rates) for name in names),
        candidates={
            table: tuple(key for key, _ in uses[table].most_common(most_keys)) for table in sorted(uses)
        },
        write_s={table: size * WRITE_PASSES / writing for table, size in sizes.items()} if writing else {},
        key_texts=texts,
        expected_runs=expected_runs,
    )


def _job(runs: Sequence[JobRun], rates: Rates) -> Job:
    plain = [run for run in runs if not run.layout]
    observed = observe(runs) if len({tuple(sorted(run.layout.items())) for run in runs}) > 1 else None
    if plain:
        now_s = median(run.seconds for run in plain)
    else:
        now_s = observed.predict({}) if observed else median(run.seconds for run in runs)
    last = runs[-1]
    shuffles = [run.shuffle_s for run in plain if run.shuffle_s is not None]
    if shuffles:
        shuffle_s = median(shuffles)
    elif rates.shuffle_bytes_per_s:
        shuffle_s = sum(side.size_bytes for side in last.sides) / rates.shuffle_bytes_per_s
    else:
        shuffle_s = 0.0
    return Job(
        name=last.name,
        runs=max(1, len(plain)),
        now_s=now_s,
        sides=last.sides,
        shuffle_s=min(shuffle_s, now_s),
        observed=observed,
    )
