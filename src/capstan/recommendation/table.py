"""Embedding rows by 64-bit ID, with their optimizer state, in one slab."""

import ctypes
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from capstan.errors import DoesNotFit, InputError, UsageError, unknown_name
from capstan.hardware.free_memory import free_host_memory
from capstan.recommendation.admission import (
    Admission,
    Eviction,
    Frequency,
    LeastFrequent,
    Probability,
    TimeToLive,
)
from capstan.recommendation.bags import Bags
from capstan.recommendation.kernels import (
    BATCH_TOO_LARGE,
    CELL,
    NO_ROW,
    SCRATCH,
    TABLE_FULL,
    TableFields,
    address_of,
    kernels,
)
from capstan.recommendation.optimizers import Adagrad, RowOptimizer
from capstan.recommendation.row_memory import row_memory

POOLINGS = ("sum", "mean", "sqrt")
_MOST_DIM = 1 << 16
_SKETCH_PER_ROW = 4
_LEVELS = 256  # how often a row was used is told apart up to here, where that matters


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """What a batch read: distinct IDs, their rows (-1: none), and which samples they occur in."""

    bags: Bags
    ids: np.ndarray
    rows: np.ndarray
    inverse: np.ndarray
    starts: np.ndarray
    bag_of_sorted: np.ndarray
    pooling: int

    @property
    def num_distinct(self) -> int:
        return len(self.ids)


class TableCounts(NamedTuple):
    """What happened since the table was made. Rows read (for training) and updated are distinct IDs."""

    rows: int
    inserted: int
    evicted: int
    expired: int
    refused: int
    late: int
    rows_read: int
    rows_updated: int


class EmbeddingTable:
    """`capacity` rows of `dim` floats, each made when its ID is first looked up for training.

    A new row is uniform in `initial`, a function of (seed, name, ID) alone: neither the order of arrival
    nor the number of threads or processes matters. An ID without a row reads as zeros. `admission` says
    which IDs are given rows (all), `eviction` which rows make room in a full table (none: `DoesNotFit`).
    A gradient whose row was evicted meanwhile is dropped and counted as late; no other row sees it.

    Not safe for several threads at once: `HybridEmbedding` orders the accesses.

    Source: Persia, arXiv 2111.05897, the embedding parameter server.
    Differs: one slab instead of a heap object a row; torch's optimizers; eviction is over the whole table.
    """

    def __init__(
        self,
        dim: int,
        *,
        capacity: int,
        optimizer: RowOptimizer | None = None,
        name: str = "table",
        seed: int = 0,
        initial: tuple[float, float] = (-0.01, 0.01),
        admission: Admission | None = None,
        eviction: Eviction | None = None,
        folder: Path | None = None,
        threads: int = 1,
    ) -> None:
        if not 1 <= dim <= _MOST_DIM:
            raise UsageError(f"Table {name!r} has dim {dim}; give 1 to {_MOST_DIM}.")
        if not 1 <= capacity < 2**31:
            raise UsageError(f"Table {name!r} has a capacity of {capacity} rows; give 1 to {2**31 - 1}.")
        if threads < 1:
            raise UsageError(f"Table {name!r} has {threads} threads; give 1 or more.")
        self._kernels = kernels()
        self.name, self.dim, self.capacity, self.seed = name, dim, capacity, seed
        self.optimizer = optimizer or Adagrad()
        self.learning_rate = self.optimizer.lr
        self.threads = threads
        self.step = 0
        self.updates = 0
        self._late = self._rows_read = self._rows_updated = 0
        self.stride = dim + self.optimizer.state_floats(dim)
        _require_room(name, capacity, index_bytes(capacity, evicts=eviction is not None))
        self._slab = row_memory(capacity, self.stride, folder)
        self._cells = np.empty(_num_cells(capacity), dtype=CELL)
        self._row_ids = np.zeros(capacity, dtype=np.uint64)
        self._order = _use_order(capacity, _LEVELS if isinstance(eviction, LeastFrequent) else 1)
        self._order = self._order if eviction else {}
        wants_sketch = isinstance(admission, Frequency) and admission.count > 1
        self._seen = np.zeros(_power_of_two(_SKETCH_PER_ROW * capacity), np.uint8) if wants_sketch else None
        self._scratch = np.zeros(0, dtype=SCRATCH)
        self._batch = 0
        self._fields = self._table_fields(initial, admission, eviction)
        self.clear()

    def _table_fields(
        self, initial: tuple[float, float], admission: Admission | None, eviction: Eviction | None
    ) -> TableFields:
        arrays = {"slab": self._slab, "cells": self._cells, "row_ids": self._row_ids, "seen": self._seen}
        arrays |= self._order
        share = admission.share if isinstance(admission, Probability) else 1.0
        return TableFields(
            **{name: address_of(array) for name, array in arrays.items()},
            cell_mask=len(self._cells) - 1,
            seen_mask=0 if self._seen is None else len(self._seen) - 1,
            capacity=self.capacity,
            stride=self.stride,
            dim=self.dim,
            levels=len(self._order.get("oldest", ())),
            time_to_live=eviction.steps if isinstance(eviction, TimeToLive) else 0,
            init_key=_key("rows", self.seed, self.name),
            admission_key=_key("admission", self.seed, self.name),
            admission_below=min(2**64 - 1, int(share * 2**64)),
            admission_count=admission.count if isinstance(admission, Frequency) else 1,
            init_low=initial[0],
            init_width=initial[1] - initial[0],
            init_state=self.optimizer.initial_state,
            state_floats=self.stride - self.dim,
        )

    # --- the two halves of a training step -------------------------------------------------------------

    def lookup(self, bags: Bags, *, pooling: str = "sum", trains: bool = True) -> tuple[np.ndarray, Lookup]:
        """Pool each sample's rows: float32 `[samples, dim]`, zeros for an empty bag.

            sum: Σ row    mean: Σ row / n    sqrt: Σ row / √n    n: IDs of the sample, repeats and all

        With `trains`, IDs without a row are given one and use is noted; otherwise nothing changes.

        Raises:
            DoesNotFit: the table is full and evicts nothing, or the batch alone has more distinct IDs.
        """
        if pooling not in POOLINGS:
            raise unknown_name("pooling", pooling, POOLINGS)
        found = self._distinct(bags, POOLINGS.index(pooling))
        if trains:
            self.step += 1
        state = self._kernels.capstan_probe(
            ctypes.byref(self._fields), address_of(found.ids), found.num_distinct,
            address_of(found.rows), int(trains), self.step,
        )  # fmt: skip
        if state in (TABLE_FULL, BATCH_TOO_LARGE):
            raise self._does_not_fit(found, evicts=state == BATCH_TOO_LARGE)
        if trains:
            self._rows_read += int(np.count_nonzero(found.rows != NO_ROW))
        pooled = np.empty((bags.num_samples, self.dim), dtype=np.float32)
        self._kernels.capstan_pool(
            ctypes.byref(self._fields), address_of(found.rows), address_of(found.inverse),
            address_of(bags.offsets), bags.num_samples, found.pooling, address_of(pooled), self.dim,
            self.threads,
        )  # fmt: skip
        return pooled, found

    def apply_gradients(self, lookup: Lookup, gradients: np.ndarray) -> None:
        """Sum the gradients of the pooled vectors, float32 `[samples, dim]`, by ID and update each row once.

        Raises:
            InputError: gradients of another shape or dtype.
        """
        wanted = (lookup.bags.num_samples, self.dim)
        if gradients.shape != wanted or gradients.dtype != np.float32:
            raise InputError(
                f"Table {self.name!r} was given gradients of shape {gradients.shape} and dtype "
                f"{gradients.dtype}; the batch that it looked up needs {wanted} and float32."
            )
        gradients = np.ascontiguousarray(gradients)
        self.updates += 1
        rule = self.optimizer.fields(self.updates, self.learning_rate)
        late = self._kernels.capstan_update(
            ctypes.byref(self._fields), ctypes.byref(rule), address_of(lookup.ids), address_of(lookup.rows),
            lookup.num_distinct, address_of(lookup.starts), address_of(lookup.bag_of_sorted),
            address_of(lookup.bags.offsets), lookup.pooling, address_of(gradients), self.dim, self.threads,
        )  # fmt: skip
        if late < 0:
            raise DoesNotFit("The host has no memory left for a row's gradient.")
        self._late += late
        self._rows_updated += int(np.count_nonzero(lookup.rows != NO_ROW)) - late

    def _distinct(self, bags: Bags, pooling: int) -> Lookup:
        count = len(bags.ids)
        if count >= 2**31:
            raise InputError(f"A batch of {count:,} IDs is too large; give fewer than 2^31.")
        self._batch += 1
        if len(self._scratch) < 2 * count or self._batch == 2**32:
            self._scratch = np.zeros(_power_of_two(max(2 * count, 64)), dtype=SCRATCH)
            self._batch = 1
        ids, inverse = np.empty(count, np.uint64), np.empty(count, np.int32)
        starts, bag_of_sorted = np.empty(count + 1, np.int32), np.empty(count, np.int32)
        found = self._kernels.capstan_distinct(
            address_of(bags.ids), count, address_of(bags.offsets), bags.num_samples,
            address_of(self._scratch), len(self._scratch) - 1, self._batch, address_of(ids),
            address_of(inverse), address_of(starts), address_of(bag_of_sorted),
        )  # fmt: skip
        return Lookup(
            bags=bags,
            ids=ids[:found],
            rows=np.empty(found, np.int64),
            inverse=inverse,
            starts=starts,
            bag_of_sorted=bag_of_sorted,
            pooling=pooling,
        )

    def _does_not_fit(self, found: Lookup, *, evicts: bool) -> DoesNotFit:
        if evicts:
            return DoesNotFit(
                f"One batch has {found.num_distinct:,} distinct IDs for table {self.name!r}, which holds "
                f"{self.capacity:,} rows. Raise its capacity or make the batch smaller."
            )
        new = int(np.count_nonzero(found.rows == NO_ROW))
        return DoesNotFit(
            f"Table {self.name!r} is full: it holds {len(self):,} of {self.capacity:,} rows and the batch "
            f"brings {new:,} new IDs. Raise its capacity, or let it evict (LeastRecent, LeastFrequent) or "
            "admit fewer (Frequency)."
        )

    # --- looking in ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self._fields.inserted - self._fields.evicted - self._fields.expired)

    @property
    def index_bytes(self) -> int:
        """Memory of everything but the rows."""
        arrays = (self._cells, self._row_ids, self._seen, *self._order.values())
        return sum(array.nbytes for array in arrays if array is not None)

    @property
    def rows_bytes(self) -> int:
        """Memory, or disk, of the rows that are there."""
        return 4 * self.stride * len(self)

    @property
    def counts(self) -> TableCounts:
        """Rows now, and what happened so far."""
        fields = self._fields
        happened = (fields.inserted, fields.evicted, fields.expired, fields.refused)
        return TableCounts(len(self), *happened, self._late, self._rows_read, self._rows_updated)

    def rows_of(self, ids: Any) -> np.ndarray:
        """The embeddings of IDs, float32 `[ids, dim]`; zeros for an ID without a row. Changes nothing."""
        return self.lookup(Bags.of(ids, slot=self.name), trains=False)[0]

    def initial_row(self, identity: int) -> np.ndarray:
        """What the row of an ID is when it is made: embedding and optimizer state."""
        row = np.empty(self.stride, dtype=np.float32)
        self._kernels.capstan_initial(ctypes.byref(self._fields), identity, address_of(row))
        return row

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            f"Table {self.name!r} cannot be copied or pickled: its index points into its memory. Make "
            "another one and give it state_dict()."
        )

    # --- keeping ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """IDs with their rows, the next to be evicted first, and the counters that the optimizer needs."""
        rows = np.empty(len(self), dtype=np.int64)
        self._kernels.capstan_live_rows(ctypes.byref(self._fields), address_of(rows))
        return {
            "ids": self._row_ids[rows],
            "rows": self._slab[rows],
            "used_at": self._order["used_at"][rows] if self._order else np.zeros(len(rows), np.int64),
            "level": self._order["level"][rows] if self._order else np.zeros(len(rows), np.uint8),
            "seen": np.zeros(0, np.uint8) if self._seen is None else self._seen.copy(),
            "dim": self.dim,
            "step": self.step,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace all rows by those of a `state_dict`, state and order of use included.

        Raises:
            InputError: another dim, another optimizer's state, or more rows than fit.
        """
        ids = np.ascontiguousarray(state["ids"], dtype=np.uint64)
        rows = np.ascontiguousarray(state["rows"], dtype=np.float32)
        used_at = np.ascontiguousarray(state["used_at"], dtype=np.int64)
        level = np.ascontiguousarray(state.get("level", np.zeros(len(ids))), dtype=np.uint8)
        if state["dim"] != self.dim or rows.shape != (len(ids), self.stride):
            raise InputError(
                f"Table {self.name!r} has dim {self.dim} and rows of {self.stride} floats with the state of "
                f"{type(self.optimizer).__name__}, but dim {state['dim']} and rows of shape {rows.shape} "
                "were to be loaded. Make the table with the dim and optimizer of the one that was saved."
            )
        if len(ids) > self.capacity:
            raise InputError(
                f"Table {self.name!r} holds {self.capacity:,} rows and {len(ids):,} were to be loaded. "
                "Raise its capacity."
            )
        if len(np.unique(ids)) != len(ids) or {len(used_at), len(level)} != {len(ids)}:
            raise InputError(f"The rows to load into table {self.name!r} do not have one ID each.")
        self.clear()
        self._kernels.capstan_insert(
            ctypes.byref(self._fields), address_of(ids), len(ids), address_of(rows), address_of(used_at),
            address_of(level),
        )  # fmt: skip
        if self._seen is not None and len(state["seen"]) == len(self._seen):
            self._seen[:] = state["seen"]
        self.step, self.updates = int(state["step"]), int(state["updates"])

    def clear(self) -> None:
        """Forget every row, and start counting anew."""
        self._cells["row"] = NO_ROW
        fields = self._fields
        fields.used = fields.evicted = fields.expired = fields.refused = fields.inserted = 0
        fields.first_free = NO_ROW
        for name in self._order.keys() & {"oldest", "newest"}:
            self._order[name][:] = NO_ROW
        if self._seen is not None:
            self._seen[:] = 0
        self.step = self.updates = self._late = self._rows_read = self._rows_updated = 0


def _require_room(name: str, capacity: int, index: int) -> None:
    """The index is written whole at once, unlike the rows: what does not fit would end the process."""
    free = free_host_memory().value
    if index > free:
        raise DoesNotFit(
            f"The index of table {name!r} for {capacity:,} rows needs {index:,} bytes of memory and "
            f"{free:,} are free. Lower its capacity."
        )


def row_bytes(dim: int, optimizer: RowOptimizer) -> int:
    """Bytes of one row: embedding and optimizer state."""
    return 4 * (dim + optimizer.state_floats(dim))


def index_bytes(capacity: int, *, evicts: bool = False, counts: bool = False) -> int:
    """Memory of the index of a table: cells, an ID a row, order of use, and counts for admission."""
    cells = CELL.itemsize * _num_cells(capacity)
    sketch = _power_of_two(_SKETCH_PER_ROW * capacity) if counts else 0
    return cells + 8 * capacity + (17 * capacity if evicts else 0) + sketch


def _use_order(capacity: int, levels: int) -> dict[str, np.ndarray]:
    """What eviction keeps: each row's neighbours in the order of use, its last use and its level; the ends of
    each level's order. 17 bytes a row."""
    by_row = {"older": np.int32, "newer": np.int32, "used_at": np.int64, "level": np.uint8}
    order = {name: np.empty(capacity, dtype=kind) for name, kind in by_row.items()}
    return order | {name: np.empty(levels, dtype=np.int64) for name in ("oldest", "newest")}


def _num_cells(capacity: int) -> int:
    return _power_of_two(capacity + capacity // 2 + 1)


def _power_of_two(at_least: int) -> int:
    return 1 << max(0, at_least - 1).bit_length()


def _key(purpose: str, seed: int, name: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(repr((purpose, seed, name)).encode(), digest_size=8).digest(), "little"
    )
