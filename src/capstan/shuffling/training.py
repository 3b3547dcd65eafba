"""Training a linear model on blocks in an order, so that it can be stopped anywhere and goes on the same."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from capstan.errors import InputError, UsageError, unknown_name
from capstan.plans import Phase, Trace
from capstan.shuffling.checkpoint import Checkpoint, EpochReport
from capstan.shuffling.examples import Examples, survey
from capstan.shuffling.linear_models import MODELS, LinearModel, Score
from capstan.shuffling.order import STRATEGIES, Order, Piece
from capstan.shuffling.reading import LINK, Account, Batches, Share, read_piece
from capstan.storage import BlockSource

COMPUTE = "host compute"
_AVERAGING_POWER = 3
_LR, _LR_OF_LINEAR = 0.2, 0.5


@dataclass(frozen=True, kw_only=True)
class Training:
    """What to train and how.

    A step has the learning rate lr · lr_decay^epoch. The model that is judged and kept is an average of the
    weights after each step, step t weighing about t³, so that it is over about the last quarter of the steps:
    the last iterate alone leans to whatever classes the last buffer had. By default lr is 0.2, and of linear
    regression, whose gradient grows with the row, 0.5 / (features + 1).

    Source: CorgiPile's first theorem, which bounds such an average (there with the cube of the epoch); the
    running form is polynomial-decay averaging (Shamir and Zhang, ICML 2013).

    Raises:
        UsageError: an unknown model or strategy, or a number that is out of its range.
    """

    label: str
    model: str
    strategy: str = "corgipile"
    features: tuple[str, ...] | None = None
    buffer_blocks: int = 1
    epochs: int = 5
    seed: int = 0
    batch_size: int = 16
    lr: float | None = None
    lr_decay: float = 0.95
    averages: bool = True

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise unknown_name("model", self.model, MODELS)
        if self.strategy not in STRATEGIES:
            raise unknown_name("strategy", self.strategy, STRATEGIES)
        for name in ("buffer_blocks", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; give 1 or more.")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}; give 0 or more.")
        for name, rate in (("lr", self.lr), ("lr_decay", self.lr_decay)):
            if rate is not None and not 0 < rate < float("inf"):
                raise UsageError(f"{name} is {rate}; give a number above 0.")

    def lr_of(self, epoch: int, num_features: int) -> float:
        """The learning rate of an epoch."""
        default = _LR_OF_LINEAR / (num_features + 1) if self.model == "linear" else _LR
        return (self.lr or default) * self.lr_decay**epoch

    def share(self, sizes: Sequence[int], epoch: int) -> Share:
        """The order of an epoch, and its steps."""
        order = Order(
            sizes=tuple(sizes),
            seed=self.seed,
            epoch=epoch,
            strategy=self.strategy,
            buffer_blocks=self.buffer_blocks,
        )
        return Share(order=order, batch_size=self.batch_size)

    def run_name(self, source: BlockSource, test: BlockSource | None) -> str:
        """A digest of all that decides the result: what a checkpoint must agree with."""
        told = [source.fingerprint, test.fingerprint if test else None, asdict(self)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The model that was judged, how rows become its inputs, its score, and what it did cost."""

    model: LinearModel
    examples: Examples
    reports: tuple[EpochReport, ...]
    score: dict[str, float]
    trace: Trace


def train(
    source: BlockSource,
    training: Training,
    *,
    test: BlockSource | None = None,
    checkpoint: Path | None = None,
    checkpoint_every_s: float = 1.0,
    on_step: Callable[[int, int], None] | None = None,
) -> Trained:
    """Train, from the checkpoint if there is one. The result does not depend on where a run was cut.

    `test` is read once and kept in memory; after each epoch the model is scored on it. Without one it is
    scored at the end, by a pass over `source`. `on_step` is told of the epoch and the step.

    Raises:
        InputError: the data changed or cannot be trained on, or the checkpoint is of another run.
    """
    return _Run(source, training, test, checkpoint, checkpoint_every_s).carry_out(on_step)


@dataclass
class _Run:
    source: BlockSource
    training: Training
    test: BlockSource | None
    checkpoint: Path | None
    checkpoint_every_s: float
    phases: list[Phase] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def carry_out(self, on_step: Callable[[int, int], None] | None) -> Trained:
        self.run = self.training.run_name(self.source, self.test)
        self.sizes = [self.source.num_rows(block) for block in range(self.source.num_blocks)]
        found = Checkpoint.load(self.checkpoint, run=self.run) if self.checkpoint else None
        state = found or self._begin()
        if found:
            self.notes.append(f"went on at epoch {found.epoch}, step {found.step}: figures are of the rest")
        judge = _Judge(self.test, state.examples)
        state = self._epochs(state, judge, on_step)
        model = self._model(state.average)
        score = state.reports[-1].score or self._score_source(model, state.examples)
        if judge.phase:
            self.phases.append(judge.phase)
        trace = Trace(
            system="shuffling",
            title=f"{self.training.model}, {self.training.strategy}",
            machine="this machine",
            phases=tuple(self.phases),
            notes=tuple(self.notes),
        )
        return Trained(model=model, examples=state.examples, reports=state.reports, score=score, trace=trace)

    def _model(self, weights: Any) -> LinearModel:
        return LinearModel(kind=self.training.model, weights=weights)

    def _begin(self) -> Checkpoint:
        account, started = Account(), time.perf_counter()
        examples = survey(
            self.source,
            label=self.training.label,
            is_regression=self.training.model == "linear",
            features=self.training.features,
            account=account,
        )
        self.phases.append(phase_of("statistics", time.perf_counter() - started, account, sum(self.sizes)))
        model = LinearModel.begin(self.training.model, examples.num_features, len(examples.classes))
        return Checkpoint(
            run=self.run,
            examples=examples,
            epoch=0,
            step=0,
            loss_sum=0.0,
            epoch_seconds=0.0,
            reports=(),
            weights=model.weights,
            average=model.weights.copy(),
        )

    def _epochs(
        self, state: Checkpoint, judge: "_Judge", on_step: Callable[[int, int], None] | None
    ) -> Checkpoint:
        training, weights, average = self.training, state.weights.copy(), state.average.copy()
        model, reports, loss_sum = self._model(weights), list(state.reports), state.loss_sum
        account, rows_seen, first_step, total_s = Account(), 0, state.step, 0.0
        computing_s, before_s = 0.0, state.epoch_seconds
        saved_s = time.perf_counter()

        def now(epoch: int, step: int, epoch_s: float) -> Checkpoint:
            return Checkpoint(
                run=self.run,
                examples=state.examples,
                epoch=epoch,
                step=step,
                loss_sum=loss_sum,
                epoch_seconds=epoch_s,
                reports=tuple(reports),
                weights=weights,
                average=average,
            )

        for epoch in range(state.epoch, training.epochs):
            share = training.share(self.sizes, epoch)
            lr, started = training.lr_of(epoch, state.examples.num_features), time.perf_counter()
            with Batches(self.source, share, start_step=first_step, account=account) as batches:
                for step, rows in enumerate(batches, start=first_step + 1):
                    begun = time.perf_counter()
                    x, y = state.examples.x(rows), state.examples.y(rows)
                    with np.errstate(over="ignore", invalid="ignore"):  # what diverges is found below
                        loss_sum += model.step(x, y, lr)
                    rows_seen += len(x)
                    self._average(average, weights, epoch * share.num_steps + step)
                    ended = time.perf_counter()
                    computing_s += ended - begun
                    if self.checkpoint and ended - saved_s >= self.checkpoint_every_s:
                        now(epoch, step, before_s + ended - started).save(self.checkpoint)
                        saved_s = time.perf_counter()
                    if on_step:
                        on_step(epoch, step)
            if not np.isfinite(weights).all():
                raise InputError(
                    f"Training diverged in epoch {epoch}: weights are not finite. Give an --lr below {lr:g}."
                )
            took_s = time.perf_counter() - started
            total_s, epoch_s = total_s + took_s, before_s + took_s
            rows_of_epoch = share.order.num_rows
            reports.append(
                EpochReport(
                    epoch=epoch,
                    loss=loss_sum / rows_of_epoch,
                    seconds=epoch_s,
                    rows_per_s=rows_of_epoch / epoch_s,
                    score=judge.score(self._model(average)),
                )
            )
            loss_sum, first_step, before_s = 0.0, 0, 0.0
            if self.checkpoint:
                now(epoch + 1, 0, 0.0).save(self.checkpoint)
        if rows_seen:
            busy = {LINK: account.reading_s, COMPUTE: computing_s}
            self.phases.append(
                Phase(
                    name="epochs",
                    seconds=total_s,
                    busy_s=busy,
                    traffic=account.traffic,
                    counts={"rows": rows_seen},
                )
            )
        return now(training.epochs, 0, 0.0)

    def _average(self, average: Any, weights: Any, step: int) -> None:
        if not self.training.averages:
            average[:] = weights
            return
        share = (1 + _AVERAGING_POWER) / (step + _AVERAGING_POWER)
        average += (weights - average) * share

    def _score_source(self, model: LinearModel, examples: Examples) -> dict[str, float]:
        account, started, score = Account(), time.perf_counter(), Score()
        for block, size in enumerate(self.sizes):
            if size:
                rows = read_piece(self.source, Piece(block=block, rows=slice(0, size)), account)
                score.add(model, examples.x(rows), examples.y(rows))
        self.phases.append(phase_of("evaluation", time.perf_counter() - started, account, sum(self.sizes)))
        return score.to_dict(examples)


class _Judge:
    """The test rows, read once, and the time that scoring took."""

    def __init__(self, test: BlockSource | None, examples: Examples) -> None:
        self._examples, self._account = examples, Account()
        self._seconds, self.num_rows = 0.0, 0
        self._x: Any = None
        if test is None:
            return
        started = time.perf_counter()
        blocks = [block for block in range(test.num_blocks) if test.num_rows(block)]
        parts = []
        for block in blocks:
            rows = read_piece(test, Piece(block=block, rows=slice(0, test.num_rows(block))), self._account)
            parts.append((examples.x(rows), examples.y(rows)))
        self._x = np.concatenate([x for x, _ in parts])
        self._y = np.concatenate([y for _, y in parts])
        self._seconds, self.num_rows = time.perf_counter() - started, len(self._x)

    def score(self, model: LinearModel) -> dict[str, float]:
        if self._x is None:
            return {}
        started, score = time.perf_counter(), Score()
        score.add(model, self._x, self._y)
        self._seconds += time.perf_counter() - started
        return score.to_dict(self._examples)

    @property
    def phase(self) -> Phase | None:
        if self._x is None:
            return None
        return phase_of("evaluation", self._seconds, self._account, self.num_rows)


def phase_of(name: str, seconds: float, account: Account, num_rows: int) -> Phase:
    """A phase that reads and computes in turns."""
    return Phase(
        name=name, seconds=seconds, busy_s={LINK: seconds}, traffic=account.traffic, counts={"rows": num_rows}
    )
