"""Embedding tables as a layer of a PyTorch model: rows may be updated late, by a stated number of steps."""

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from capstan.errors import InputError, UsageError, unknown_name
from capstan.recommendation.bags import Bags
from capstan.recommendation.batch_reader import read_bags
from capstan.recommendation.kernels import is_finite
from capstan.recommendation.table import POOLINGS, EmbeddingTable, Lookup
from capstan.recommendation.update_worker import UpdateWorker

MODES = ("sync", "hybrid", "async")
RAW = "raw"


class StalenessCounts(NamedTuple):
    """Batches looked up for training, applied, given up, in flight now and at most, and the bound."""

    looked_up: int
    applied: int
    discarded: int
    in_flight: int
    peak_in_flight: int
    bound: int


@dataclass
class _Batch:
    """A training batch between its lookup and its update."""

    number: int
    source: Any
    found: dict[str, tuple[np.ndarray, Lookup]] | None = None
    is_stepped: bool = False
    gradients: dict[str, Tensor] = field(default_factory=dict)


class HybridEmbedding(nn.Module):
    """Tables by slot; `forward(batch)` gives `{slot: float32 [samples, dim]}`, and backward fills gradients.

        embedding = HybridEmbedding({"item": EmbeddingTable(16, capacity=10**6)}, mode="hybrid", staleness=4)
        for batch, labels in batches:
            loss = criterion(network(embedding(batch)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            embedding.step()
        embedding.flush()

    `mode` says when the rows of a batch are updated. With τ = `staleness`, a batch is in flight from its
    lookup until its update, and never are more than τ in flight, the one being computed included:

    - `sync` (τ = 1): in `step()`. Batch j reads every update before it.
    - `hybrid`: by a thread in the background, so that j reads the updates of all batches up to j - τ and no
      later one. The result depends on τ and not on timing; τ = 1 is `sync` bit for bit.
    - `async`: by the same thread as soon as it can, so j reads updates up to j - τ and some of those after
      it, whatever was done: reproducible only by chance.

    `pooling` is sum, mean, sqrt (Σ/√n), or raw: one row for each ID in the order of the batch, so
    `[IDs, dim]`. One name for all slots, or a mapping.

    In eval mode, or under `torch.no_grad()`, unknown IDs read as zeros, nothing is inserted, and updates in
    flight are finished first.

    Source: Persia, arXiv 2111.05897, section 4.
    Differs: Persia's staleness is any up to the bound, ours in `hybrid` always the bound, which makes it
    reproducible; the bound holds on every path.
    """

    def __init__(
        self,
        tables: Mapping[str, EmbeddingTable],
        *,
        pooling: str | Mapping[str, str] = "sum",
        mode: str = "sync",
        staleness: int = 1,
        patience_s: float = 600.0,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise unknown_name("mode", mode, MODES)
        if staleness < 1 or (mode == "sync" and staleness != 1):
            raise UsageError(
                f"mode={mode!r} cannot have staleness={staleness}: synchronous training is 1, and hybrid or "
                "async 1 or more."
            )
        if not tables or len({id(table) for table in tables.values()}) < len(tables):
            raise UsageError("Give one or more slots, and each a table of its own.")
        self.tables = dict(tables)
        self.pooling = _poolings(pooling, list(tables))
        self.mode, self.staleness = mode, staleness
        self._anchor = torch.zeros((), requires_grad=True)  # what autograd follows to our backward
        self._open: _Batch | None = None
        self._ahead: _Batch | None = None
        self._held: deque[_Batch] = deque()
        self._scheduled = self._looked_up = self._applied = self._discarded = self._peak = 0
        self._tables_lock = threading.Lock()
        self.lookups_s = self.updates_s = 0.0  # what training's lookups and updates took
        self._worker = UpdateWorker(staleness + 1, patience_s=patience_s)

    # --- an ordinary loop ------------------------------------------------------------------------------

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Pooled rows by slot; see `read_bags` for what a batch can be.

        Raises:
            InputError, UsageError: what `read_bags` says; or the last batch's gradients wait for `step()`.
            DoesNotFit: a table is full.
        """
        if not (self.training and torch.is_grad_enabled()):
            bags = read_bags(batch, list(self.tables))
            self.flush()
            return {
                slot: torch.from_numpy(pooled) for slot, (pooled, _) in self._look_up(bags, False).items()
            }
        self._open = self._looked_up_now(batch) if self._ahead is None else self._looked_up_ahead(batch)
        self._release()
        outputs = _Rows.apply(self._anchor, self._open)  # type: ignore[no-untyped-call]
        return dict(zip(self.tables, outputs, strict=True))

    def prefetch(self, batch: Any) -> None:
        """Look up the next batch in the background, while the network computes this one.

        Call it between `forward` and `step`, and give `forward` the same object next. It reads what it
        would have read then: results do not change.

        Raises:
            UsageError: with a staleness of 1 the next batch reads this one's update, so it must wait.
        """
        if self.staleness < 2:
            raise UsageError(
                "prefetch() needs a staleness of 2 or more: the next batch would miss this one's."
            )
        if self._ahead is not None or self._open is None:
            raise UsageError("prefetch() takes one batch, between forward and step of the batch before.")
        bags = read_bags(batch, list(self.tables))
        self._scheduled += 1
        self._ahead = ahead = _Batch(number=self._scheduled, source=batch)
        self._worker.submit(lambda: self._look_up_for(ahead, bags))

    def step(self) -> None:
        """Hand the gradients of the last batch to the tables. Call it where the optimizer's step is called.

        Raises:
            UsageError: there was no backward since the last step.
            InputError: a gradient is not finite. Nothing of the batch is applied; `discard()` gives it up.
        """
        if self._open is None or not self._open.gradients:
            raise UsageError("step() has nothing to apply: call it after backward, once for each batch.")
        for slot, gradient in self._open.gradients.items():
            if not is_finite(gradient.numpy()):
                raise InputError(
                    f"The gradient of slot {slot!r} is not finite. Lower the learning rate or the loss's "
                    "scale; discard() goes on without this batch."
                )
        self._open.is_stepped = True
        self._held.append(self._open)
        self._open = None
        self._release()

    def discard(self) -> None:
        """Give up the last batch: its gradients are applied nowhere."""
        if self._open is not None:
            self._open = None
            self._discarded += 1

    def flush(self) -> None:
        """Apply everything in flight and wait for it; an error of the background is raised here."""
        while self._held:
            self._hand_over(self._held.popleft())
        self._worker.drain()

    def close(self) -> None:
        """Flush and end the background thread; the next step starts it again."""
        self.flush()
        self._worker.close()

    @property
    def staleness_counts(self) -> StalenessCounts:
        """How many batches were looked up, applied, and in flight."""
        return StalenessCounts(
            self._looked_up, self._applied, self._discarded, self._in_flight, self._peak, self.staleness
        )

    # --- when ------------------------------------------------------------------------------------------

    @property
    def _in_flight(self) -> int:
        return self._looked_up - self._applied - self._discarded

    def _looked_up_now(self, source: Any) -> _Batch:
        """Look up, with fewer than τ batches in flight and none half done."""
        bags = read_bags(source, list(self.tables))
        self._finish_last()
        self._worker.wait_for(lambda: self._in_flight < self.staleness)
        if self.mode != "async":  # what may be applied by now, is
            self._worker.drain()
        self._scheduled += 1
        batch = _Batch(number=self._scheduled, source=source)
        try:
            self._look_up_for(batch, bags)
        except BaseException:
            self._scheduled -= 1
            raise
        return batch

    def _looked_up_ahead(self, source: Any) -> _Batch:
        ahead = self._ahead
        assert ahead is not None
        if ahead.source is not source:
            raise UsageError("forward() was given another batch than prefetch(). Give it the same object.")
        self._finish_last()
        self._worker.wait_for(lambda: ahead.found is not None)
        self._ahead = None
        return ahead

    def _finish_last(self) -> None:
        if self._open is not None and self._open.gradients:
            raise UsageError("The last batch's gradients were not applied. Call step(), or discard() them.")
        self.discard()

    def _look_up_for(self, batch: _Batch, bags: Mapping[str, Bags]) -> None:
        found = self._look_up(bags, True)
        self._looked_up += 1
        self._peak = max(self._peak, self._in_flight)
        batch.found = found

    def _release(self) -> None:
        """Apply what the next lookup is to read: all but the last τ - 1 batches."""
        newest = self._scheduled if self.mode == "async" else self._scheduled + 1 - self.staleness
        while self._held and self._held[0].number <= newest:
            self._hand_over(self._held.popleft())

    def _hand_over(self, batch: _Batch) -> None:
        if self.mode == "sync":
            self._update_rows(batch)
        else:
            self._worker.submit(lambda: self._update_rows(batch))

    def _update_rows(self, batch: _Batch) -> None:
        assert batch.found is not None
        with self._tables_lock:
            started_s = time.perf_counter()
            for slot, gradient in batch.gradients.items():
                self.tables[slot].apply_gradients(batch.found[slot][1], gradient.numpy())
            self.updates_s += time.perf_counter() - started_s
        self._applied += 1

    def _look_up(self, bags: Mapping[str, Bags], trains: bool) -> dict[str, tuple[np.ndarray, Lookup]]:
        found = {}
        with self._tables_lock:
            started_s = time.perf_counter()
            for slot, each in bags.items():
                pooling = self.pooling[slot]
                if pooling == RAW:
                    each, pooling = Bags.of(each.ids, slot=slot), "sum"
                found[slot] = self.tables[slot].lookup(each, pooling=pooling, trains=trains)
            self.lookups_s += time.perf_counter() - started_s if trains else 0.0
        return found

    # --- keeping ---------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """What `state_dict()` keeps: each table's rows, with everything in flight applied."""
        self.flush()
        return {slot: _as_tensors(table.state_dict()) for slot, table in self.tables.items()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Rows from `get_extra_state`."""
        self.flush()
        self.discard()
        if self._ahead is not None:
            self._ahead = None
            self._discarded += 1
        if set(state) != set(self.tables):
            raise InputError(
                f"The slots here are {', '.join(self.tables)}, but {', '.join(state)} were to be loaded."
            )
        for slot, table in self.tables.items():
            table.load_state_dict(_as_arrays(state[slot]))


class _Rows(torch.autograd.Function):
    """Identity on pooled rows; backward leaves their gradients with the batch."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, batch: _Batch) -> tuple[Tensor, ...]:
        assert batch.found is not None
        ctx.batch, ctx.slots = batch, tuple(batch.found)
        ctx.set_materialize_grads(False)
        return tuple(torch.from_numpy(pooled) for pooled, _ in batch.found.values())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None]:
        if ctx.batch.is_stepped:
            raise UsageError("The rows of this batch were updated already. Call backward before step().")
        kept = ctx.batch.gradients
        for slot, gradient in zip(ctx.slots, gradients, strict=True):
            if gradient is not None:
                # A copy: autograd may give out memory that it uses again.
                kept[slot] = (
                    kept[slot] + gradient
                    if slot in kept
                    else gradient.clone(memory_format=torch.contiguous_format)
                )
        return None, None


def _poolings(pooling: str | Mapping[str, str], slots: list[str]) -> dict[str, str]:
    chosen = dict.fromkeys(slots, pooling) if isinstance(pooling, str) else dict(pooling)
    for slot in chosen:
        if slot not in slots:
            raise unknown_name("slot", slot, slots)
    for each in chosen.values():
        if each not in (*POOLINGS, RAW):
            raise unknown_name("pooling", each, (*POOLINGS, RAW))
    return {slot: chosen.get(slot, "sum") for slot in slots}


def _as_tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: torch.from_numpy(value.view(np.int64) if value.dtype == np.uint64 else value)
        if isinstance(value, np.ndarray)
        else value
        for name, value in state.items()
    }


def _as_arrays(state: dict[str, Any]) -> dict[str, Any]:
    arrays = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in state.items()}
    return arrays | {"ids": arrays["ids"].view(np.uint64)}
