"""Plan, train, measure: what `capstan recommend train` does."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from capstan.errors import UsageError
from capstan.hardware import Machine
from capstan.plans import Phase, Plan, Trace
from capstan.recommendation.area_under_curve import area_under_curve
from capstan.recommendation.click_log import ClickLog
from capstan.recommendation.hybrid_embedding import StalenessCounts
from capstan.recommendation.planner import (
    PROCESSOR,
    TO_NETWORK,
    TO_TABLE,
    Workload,
    capacities,
    count_workload,
    plan_training,
    traffic_of,
)
from capstan.recommendation.recommender import Recommender
from capstan.recommendation.table import TableCounts
from capstan.recommendation.training_config import RecommenderConfig


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training came to. `losses` are means of the epochs that were trained now."""

    recommender: Recommender
    plan: Plan
    trace: Trace
    auc: float | None
    samples_per_s: float
    staleness: StalenessCounts
    losses: tuple[float, ...]
    tables: dict[str, TableCounts]


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training that is planned and then run.

    With `output`, the recommender is kept there after every epoch, and a training that finds one there
    goes on with the epochs that are missing. `folder` keeps rows on its disk.
    """

    config: RecommenderConfig
    data: Path
    machine: Machine
    test: Path | None = None
    epochs: int = 1
    batch_size: int = 4096
    mode: str = "sync"
    staleness: int = 1
    seed: int = 0
    memory_bytes: int | None = None
    folder: Path | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "staleness"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; give 1 or more.")
        if self.mode == "sync" and self.staleness != 1:
            raise UsageError(
                f"Synchronous training has a staleness of 1, not {self.staleness}. Give --mode hybrid."
            )

    def plan(self) -> Plan:
        """What all epochs will take."""
        return self._plan(self._workload(), self.epochs)

    def _workload(self) -> Workload:
        log = ClickLog(self.data, self.config)
        return count_workload(log.batches(self.batch_size), list(self.config.slots))

    def _plan(self, workload: Workload, epochs: int) -> Plan:
        return plan_training(
            self.config,
            workload,
            self.machine,
            epochs=epochs,
            batch_size=self.batch_size,
            mode=self.mode,
            staleness=self.staleness,
            memory_bytes=self.memory_bytes,
            on_disk=self.folder is not None,
        )

    def run(self, report: Callable[[float, str], None] = lambda share, text: None) -> Trained:
        """Train what is missing, and score the test file."""
        log = ClickLog(self.data, self.config)
        test = (
            ClickLog(self.test, self.config) if self.test else None
        )  # a wrong file is found before training
        workload = self._workload()
        plan = self._plan(workload, self.epochs)
        recommender = Recommender.build(
            self.config,
            capacities(self.config, workload),
            mode=self.mode,
            staleness=self.staleness,
            seed=self.seed,
            folder=self.folder,
        )
        kept = self.output / "recommender.pt" if self.output else None
        if kept and kept.exists():
            recommender.load(kept, self._how)
            plan = self._plan(workload, max(0, self.epochs - recommender.epochs_done))
        losses = []
        while recommender.epochs_done < self.epochs:
            report(recommender.epochs_done / self.epochs, f"epoch {recommender.epochs_done + 1}")
            losses.append(recommender.train_epoch(log, self.batch_size))
            if kept:
                recommender.save(kept, self._how)
        phases = [self._train_phase(recommender, len(losses) * workload.num_samples)]
        auc = None
        if test:
            started_s = time.perf_counter()
            auc = area_under_curve(*recommender.scores(test, self.batch_size))
            seconds = time.perf_counter() - started_s
            phases.append(Phase(name="test", seconds=seconds, counts={"samples": test.num_samples}))
        recommender.embedding.close()
        trained_s = recommender.clock.epochs_s
        return Trained(
            recommender=recommender,
            plan=plan,
            trace=self._trace(plan, recommender, tuple(phases)),
            auc=auc,
            samples_per_s=len(losses) * workload.num_samples / trained_s if trained_s else 0.0,
            staleness=recommender.embedding.staleness_counts,
            losses=tuple(losses),
            tables={slot: table.counts for slot, table in recommender.embedding.tables.items()},
        )

    @property
    def _how(self) -> dict[str, object]:
        names = ("batch_size", "mode", "staleness", "seed")
        return {name: getattr(self, name) for name in names}

    def _train_phase(self, recommender: Recommender, num_samples: int) -> Phase:
        counts = {slot: table.counts for slot, table in recommender.embedding.tables.items()}
        return Phase(
            name="train",
            seconds=recommender.clock.epochs_s,
            busy_s={
                TO_NETWORK: recommender.embedding.lookups_s,
                TO_TABLE: recommender.embedding.updates_s,
                PROCESSOR: recommender.clock.network_s,
            },
            traffic=traffic_of(
                self.config,
                {slot: each.rows_read for slot, each in counts.items()},
                {slot: each.rows_updated for slot, each in counts.items()},
            ),
            counts={"samples": num_samples, "rows": sum(each.rows_read for each in counts.values())},
        )

    def _trace(self, plan: Plan, recommender: Recommender, phases: tuple[Phase, ...]) -> Trace:
        tables = recommender.embedding.tables.values()
        in_memory = 0 if self.folder else sum(table.rows_bytes for table in tables)
        staleness = recommender.embedding.staleness_counts
        return Trace(
            system=plan.system,
            title=plan.title,
            machine=self.machine.name,
            phases=phases,
            peak_bytes={"tables": in_memory + sum(table.index_bytes for table in tables)},
            notes=(f"at most {staleness.peak_in_flight} of {staleness.bound} batches were in flight",),
        )
