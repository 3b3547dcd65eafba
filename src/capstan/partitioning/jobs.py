"""Joins and groups by user functions, bucket by bucket: memory for one bucket, not for a table.

Where both tables lie by the job's keys nothing is shuffled; a table that does not is scattered into buckets
on disk first.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capstan.errors import UsageError
from capstan.partitioning.buckets import comparable, is_null
from capstan.partitioning.history import JobRun, Side
from capstan.partitioning.reading import Key, read_key
from capstan.partitioning.recording import recorder
from capstan.partitioning.scattering import bucket_folder, scatter
from capstan.partitioning.tables import Table, read_batches

KeyFunction = Callable[[Any], Any] | str


@dataclass
class _Input:
    """A table on its way through a job: by buckets, and what was counted of it."""

    table: Table
    key: Key
    num_rows: int = 0
    num_keys: int = 0
    largest: int = 0
    shuffled: Path | None = None
    shuffle_bytes: int = 0

    def shuffle(self, folder: Path, num_buckets: int) -> None:
        self.shuffled = folder
        done = scatter(
            read_batches(self.table.files()),
            lambda columns: self.key.function(self.table.to_row(self._plain(columns)[0])),
            folder,
            num_buckets=num_buckets,
        )
        self.shuffle_bytes = sum(done.size_bytes.values())

    def is_like(self, other: "_Input") -> bool:
        """Whether the same rows go to the same buckets, as when a table is joined with itself."""
        return self.table is other.table and self.key.is_reusable and self.key.identity == other.key.identity

    def rows(self, bucket: int, num_buckets: int) -> Iterator[tuple[object, Any]]:
        """Keys and rows of a bucket."""
        if self.shuffled is not None:
            path = bucket_folder(self.shuffled, bucket) / "rows.parquet"
            files = [path] if path.exists() else []
        else:
            files = self.table.bucket_files(bucket, num_buckets)
        for batch in read_batches(files):
            for columns in batch.to_pylist():
                columns, stored = self._plain(columns)
                row = self.table.to_row(columns)
                key = stored[0] if stored and self.shuffled is None else self.key.function(row)
                self.num_rows += 1
                yield comparable(key), row

    def _plain(self, columns: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        """The user's columns, and the key where the layout stores it."""
        layout = self.table.layout
        if layout is None or layout.key_column is None:
            return columns, []
        return columns, [columns.pop(layout.key_column)]

    def count(self, keys: Counter[object]) -> None:
        self.num_keys += len(keys)
        self.largest = max([self.largest, *keys.values()])

    @property
    def side(self) -> Side:
        return Side(
            table=self.table.name,
            key=self.key.identity,
            key_text=str(self.key),
            level=self.key.level,
            is_reusable=self.key.is_reusable,
            num_rows=self.num_rows,
            size_bytes=self.table.size_bytes,
            num_keys=self.num_keys,
            largest_share=self.largest / self.num_rows if self.num_rows else None,
        )


@dataclass
class _Clock:
    """Seconds of a job, without those in which whoever reads its results was busy."""

    started_s: float = field(default_factory=time.perf_counter)
    waited_s: float = 0.0

    def hand_out(self, value: Any) -> Iterator[Any]:
        before = time.perf_counter()
        yield value
        self.waited_s += time.perf_counter() - before

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started_s - self.waited_s


def join(
    left: Table,
    right: Table,
    *,
    key: KeyFunction,
    other: KeyFunction,
    combine: Callable[[Any, Any], Any] = lambda left, right: (left, right),
    name: str = "join",
    num_buckets: int = 16,
    scratch: Path | str | None = None,
) -> Iterator[Any]:
    """`combine(l, r)` for all rows with `key(l) == other(r)`, bucket by bucket: an inner join.

    Keys that are None join with nothing, NaN with NaN. Rows of one bucket of `right` are in memory at a time.
    The order of results depends on the layout, what they are does not.

    Args:
        left, right: the tables; `left` is streamed, so make it the larger one.
        key, other: functions of a row, or names of columns.
        combine: makes a result of two rows.
        name: what the job is called in a history.
        num_buckets: into how many buckets to shuffle where no layout says.
        scratch: a folder for shuffled rows; by default the system's.
    """
    sides = [
        _Input(left, read_key(key, of=_class(left))),
        _Input(right, read_key(other, of=_class(right))),
    ]
    # Here, not when the results are read: a recording that is open now may be closed by then.
    return _joined(sides, combine, name, num_buckets, scratch, recorder())


def _joined(
    sides: list[_Input],
    combine: Callable[[Any, Any], Any],
    name: str,
    num_buckets: int,
    scratch: Path | str | None,
    keep: Callable[[JobRun], None],
) -> Iterator[Any]:
    with ExitStack() as stack:
        clock = _Clock()
        shuffle_s, count = _bring_together(sides, num_buckets, scratch, stack)
        num_results = 0
        for bucket in range(count):
            rows: dict[object, list[Any]] = {}
            for value, row in sides[1].rows(bucket, count):
                if not is_null(value):
                    rows.setdefault(value, []).append(row)
            sides[1].count(Counter({value: len(each) for value, each in rows.items()}))
            seen: Counter[object] = Counter()
            for value, row in sides[0].rows(bucket, count):
                seen[value] += not is_null(value)
                for match in rows.get(value, ()):
                    num_results += 1
                    yield from clock.hand_out(combine(row, match))
            sides[0].count(+seen)
        keep(_run(name, "join", sides, clock, shuffle_s, num_results))


def group(
    table: Table,
    *,
    key: KeyFunction,
    reduce: Callable[[list[Any]], Any] = list,
    name: str = "group",
    num_buckets: int = 16,
    scratch: Path | str | None = None,
) -> Iterator[tuple[object, Any]]:
    """`(key, reduce(rows))` for each key, bucket by bucket; None is a key, as NaN is.

    Rows of one bucket are in memory at a time. For the arguments see `join`.
    """
    side = _Input(table, read_key(key, of=_class(table)))
    return _grouped(side, reduce, name, num_buckets, scratch, recorder())


def _grouped(
    side: _Input,
    reduce: Callable[[list[Any]], Any],
    name: str,
    num_buckets: int,
    scratch: Path | str | None,
    keep: Callable[[JobRun], None],
) -> Iterator[tuple[object, Any]]:
    with ExitStack() as stack:
        clock = _Clock()
        shuffle_s, count = _bring_together([side], num_buckets, scratch, stack)
        num_results = 0
        for bucket in range(count):
            rows: dict[object, list[Any]] = {}
            for value, row in side.rows(bucket, count):
                rows.setdefault(value, []).append(row)
            side.count(Counter({value: len(each) for value, each in rows.items()}))
            for value, each in rows.items():
                num_results += 1
                yield from clock.hand_out((value, reduce(each)))
        keep(_run(name, "group", [side], clock, shuffle_s, num_results))


def _bring_together(
    sides: list[_Input], num_buckets: int, scratch: Path | str | None, stack: ExitStack
) -> tuple[float, int]:
    """Shuffle the sides that do not lie by their keys; the seconds it took, and the number of buckets."""
    counts = [
        side.table.layout.num_buckets for side in sides if side.table.lies_by(side.key) and side.table.layout
    ]
    count = min(counts, default=num_buckets)
    if count < 1:
        raise UsageError(f"{count} buckets were asked for; give 1 or more.")
    started_s = time.perf_counter()
    for side in sides:
        layout = side.table.layout
        if layout is None or not side.table.lies_by(side.key) or layout.num_buckets % count:
            if side is not sides[0] and sides[0].shuffled and side.is_like(sides[0]):
                side.shuffled = sides[0].shuffled  # a table joined with itself is shuffled once
                continue
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="capstan-shuffle-", dir=scratch))
            side.shuffle(Path(folder), count)
    return time.perf_counter() - started_s, count


def _run(
    name: str, kind: str, sides: list[_Input], clock: _Clock, shuffle_s: float, num_results: int
) -> JobRun:
    return JobRun(
        name=name,
        kind=kind,
        seconds=clock.seconds,
        sides=tuple(side.side for side in sides),
        layout={side.table.name: side.key.identity for side in sides if side.shuffled is None},
        shuffle_s=shuffle_s,
        shuffle_bytes=sum(side.shuffle_bytes for side in sides),
        result_rows=num_results,
    )


def _class(table: Table) -> type | None:
    return table.row if isinstance(table.row, type) else None
