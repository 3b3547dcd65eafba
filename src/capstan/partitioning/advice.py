"""Advice: which tables to lay out by which key, or none, and what to expect of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capstan.errors import UsageError, unknown_name
from capstan.partitioning.cost import Job, Rates, Workload, workload
from capstan.partitioning.history import History, JobRun
from capstan.partitioning.search import Placed, cheapest
from capstan.plans import Alternative, Choice, Phase, Plan, explain, seconds_text

# Below this share of the time now a gain is within what two runs of the same thing differ by.
LEAST_GAIN = 0.03
# A table whose layout gains less than this share of the time now is left as it is.
LEAST_GAIN_OF_A_TABLE = 0.01


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A layout (table -> identity of its key; empty: none), its price beside that of others, and why."""

    choice: Mapping[str, str]
    key_texts: Mapping[str, str]
    now_s: float
    predicted_s: float
    jobs: tuple[Phase, ...]
    alternatives: tuple[Alternative, ...]
    reasons: tuple[str, ...]
    advisor: str
    rates: Rates

    @property
    def expected_speedup(self) -> float:
        """Seconds now / seconds predicted, of all recorded runs; 1 for none."""
        return self.now_s / self.predicted_s if self.choice and self.predicted_s else 1.0

    @property
    def plan(self) -> Plan:
        """The advice as a plan: a phase a job."""
        return Plan(
            system="partitioning",
            title=f"{self.advisor} advisor: {layout_text(self.choice, self.key_texts)}",
            machine=self.rates.source,
            phases=self.jobs,
            choices=tuple(
                Choice(
                    name=table,
                    value=self.key_texts.get(key) or key,
                    reason="both sides of its joins lie by it",
                )
                for table, key in self.choice.items()
            )
            or (Choice(name="layout", value="none", reason=self.reasons[0]),),
            decision={"layout": dict(self.choice), "expected_speedup": self.expected_speedup},
            bound="what is left is the jobs' own work: reading, user functions, results",
            alternatives=self.alternatives,
        )

    def explain(self) -> str:
        """Why, and what is expected, as text."""
        return explain(self.plan) + "".join(f"because: {reason}\n" for reason in self.reasons)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        choice: object = {
            table: {"key": self.key_texts.get(key, ""), "identity": key} for table, key in self.choice.items()
        }
        return {
            "choice": choice or "none",
            "expected_speedup": self.expected_speedup,
            "alternatives": [asdict(each) for each in self.alternatives],
            "reasons": list(self.reasons),
            "plan": self.plan.to_dict(),
        }


Advisor = Callable[[Workload], Placed]


def _by_rules(known: Workload) -> Placed:
    """The costliest join whose two keys may be stored, then the next that contradicts none before it."""
    layout: Placed = {}
    for job in sorted(known.jobs, key=lambda job: -job.shuffle_s * job.runs):
        wanted = {side.table: side.key for side in job.sides}
        is_possible = all(
            side.is_reusable
            and wanted[side.table] == side.key
            and layout.get(side.table, side.key) == side.key
            for side in job.sides
        )
        if job.sides and is_possible:
            layout |= wanted
    return layout


def _most_frequent(known: Workload) -> Placed:
    """Each table by the key that is used most: what a join's other side does is not asked."""
    return {table: keys[0] for table, keys in known.candidates.items() if keys}


ADVISORS: Mapping[str, Advisor] = {"cost": cheapest, "rules": _by_rules, "frequent": _most_frequent}


def advise(
    history: History | Path | str | Sequence[JobRun],
    *,
    advisor: str = "cost",
    rates: Rates | None = None,
    expected_runs: int = 10,
    most_keys: int = 3,
) -> Advice:
    """Choose a layout for the tables of a history.

    Args:
        history: recorded runs.
        advisor: "cost" weighs all layouts; "rules" takes the costliest joins; "frequent" the most
            frequent key of each table. Whichever it is, none is chosen where it would gain less than 3 %.
        rates: seconds for a byte, where the history did not time its shuffles; see `Rates.of_machine`.
        expected_runs: how often the recorded work will run again, over which writing is spread.
        most_keys: how many keys of a table are weighed.

    Source: Lachesis, arXiv 2006.16529, candidates and rules.
    Differs: costs are predicted and searched, not learned: at 432 layouts nothing needs to be learned.

    Raises:
        UsageError: an unknown advisor, or no run to expect.
    """
    if advisor not in ADVISORS:
        raise unknown_name("advisor", advisor, ADVISORS)
    if expected_runs < 1:
        raise UsageError(
            f"A layout is for work that runs again; expected_runs is {expected_runs}, give 1 or more."
        )
    if isinstance(history, str | Path):
        history = History(history)
    runs = history.runs() if isinstance(history, History) else list(history)
    known = workload(runs, rates or Rates.of_runs(runs), most_keys=most_keys, expected_runs=expected_runs)
    measured = rates or Rates.of_runs(runs)
    if not runs:
        return _none(known, advisor, measured, ("the history holds no run: no record, no advice",))
    wanted = _without_what_gains_little(known, ADVISORS[advisor](known))
    now_s, then_s = known.seconds({}), known.seconds(wanted)
    gain = 1 - then_s / now_s if now_s else 0.0
    if not wanted:
        return _none(known, advisor, measured, (_why_none(known),))
    if gain < LEAST_GAIN:
        reason = f"the best that was found is predicted to gain {gain:.1%}, less than {LEAST_GAIN:.0%}"
        return _none(known, advisor, measured, (reason,), weighed=wanted)
    return _advice(known, advisor, measured, wanted, tuple(_reasons(known, wanted)))


def _without_what_gains_little(known: Workload, layout: Placed) -> Placed:
    """Leave tables as they are that gain less than predictions err, the least first."""
    now_s = known.seconds({})
    while layout:
        fewer = [{table: layout[table] for table in layout if table != each} for each in layout]
        best = min(fewer, key=known.seconds)
        needed_s = max(LEAST_GAIN_OF_A_TABLE * now_s, known.doubt_s(best, layout))
        if known.seconds(best) - known.seconds(layout) >= needed_s:
            return layout
        layout = best
    return layout


def _none(
    known: Workload, advisor: str, rates: Rates, reasons: tuple[str, ...], weighed: Placed | None = None
) -> Advice:
    advice = _advice(known, advisor, rates, {}, reasons)
    if not weighed:
        return advice
    other = Alternative(
        name=layout_text(weighed, known.key_texts), seconds=known.seconds(weighed), reason="gains too little"
    )
    kept = [each for each in advice.alternatives if each.name != other.name]
    return Advice(**{**vars(advice), "alternatives": (other, *kept)})


def _advice(known: Workload, advisor: str, rates: Rates, layout: Placed, reasons: tuple[str, ...]) -> Advice:
    return Advice(
        choice=dict(sorted(layout.items())),
        key_texts=known.key_texts,
        now_s=known.seconds({}),
        predicted_s=known.seconds(layout),
        jobs=tuple(_phase(job, layout) for job in known.jobs),
        alternatives=tuple(_alternatives(known, layout)),
        reasons=reasons,
        advisor=advisor,
        rates=rates,
    )


def _phase(job: Job, layout: Placed) -> Phase:
    counts = {"runs": job.runs, "rows": job.runs * sum(side.num_rows for side in job.sides)}
    return Phase(name=job.name, seconds=job.seconds(layout) * job.runs, counts=counts)


def _alternatives(known: Workload, chosen: Placed) -> list[Alternative]:
    """None, what the other advisors say, and the choice with one table left out."""
    weighed: list[tuple[Placed, str]] = [({}, "nothing is moved")]
    weighed += [(advisor(known), f"what the {name} advisor says") for name, advisor in ADVISORS.items()]
    weighed += [
        ({table: key for table, key in chosen.items() if table != left}, f"without {left}") for left in chosen
    ]
    seen = [dict(chosen)]
    found = []
    for layout, reason in weighed:
        if layout not in seen:
            seen.append(layout)
            name = layout_text(layout, known.key_texts)
            found.append(Alternative(name=name, seconds=known.seconds(layout), reason=reason))
    return sorted(found, key=lambda each: each.seconds)


def _reasons(known: Workload, layout: Placed) -> list[str]:
    reasons = []
    for job in known.jobs:
        before, after = job.seconds({}), job.seconds(layout)
        if abs(after - before) < LEAST_GAIN_OF_A_TABLE * max(before, 1e-9):
            continue
        if job.observed is not None:
            tables = [table for table in job.observed.tables if table in layout]
            how = f"measured with {', '.join(tables)} laid out so" if tables else "measured"
        elif after < before:
            how = "its sides lie by its keys: no shuffle"
        else:
            how = "assumed: a side of it lies by another key"
        reasons.append(f"{job.name}: {seconds_text(before)} -> {seconds_text(after)} a run, {how}")
    for table in layout:
        if table in known.write_s:
            written = seconds_text(known.write_s[table])
            reasons.append(f"{table} is written once, {written}, spread over {known.expected_runs} runs")
    return reasons


def _why_none(known: Workload) -> str:
    if not known.candidates:
        return "no job has a key that may be stored: there are none, or they are opaque and may change"
    if not any(job.shuffle_s or job.observed for job in known.jobs):
        return "no shuffle was timed and no rates are given, so that no gain can be predicted"
    return "every layout that was weighed is predicted to be as slow as none, or slower"


def layout_text(layout: Mapping[str, str], key_texts: Mapping[str, str]) -> str:
    """`orders by row['okey'], lines by row['okey']`, or `none`."""
    return ", ".join(f"{table} by {key_texts.get(key) or key}" for table, key in layout.items()) or "none"
