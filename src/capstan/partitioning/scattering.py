"""Rows into buckets on disk: what a shuffle does, and what a layout keeps."""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capstan.errors import InputError, UsageError
from capstan.partitioning.buckets import bucket_of, comparable
from capstan.storage.atomic import make_folder, not_written

if TYPE_CHECKING:
    import pyarrow as pa

MOST_BUCKETS = 512  # each keeps a file open while rows are scattered
_BUFFERED_BYTES = 16 * 2**20


@dataclass(kw_only=True)
class Scattered:
    """Rows and bytes of each bucket that has any; the column that keeps the key, if one does."""

    num_rows: Counter[int] = field(default_factory=Counter)
    size_bytes: dict[int, int] = field(default_factory=dict)
    key_column: str | None = None


def bucket_folder(folder: Path, bucket: int) -> Path:
    """Hive's way to name a partition."""
    return folder / f"__b={bucket:04d}"


def scatter(
    batches: Iterable["pa.RecordBatch"],
    key_of: Callable[[dict[str, Any]], object],
    folder: Path,
    *,
    num_buckets: int,
    key_column: str | None = None,
) -> Scattered:
    """Write each row to the file of its key's bucket; buckets without rows have no file.

    Memory: one batch and 16 MiB of rows that wait to be written. With `key_column` the keys are stored beside
    the rows, where they are of a plain type.

    Raises:
        DoesNotFit: the disk is full.
        InputError: keys that cannot be hashed, or stored ones that change their type.
    """
    if not 1 <= num_buckets <= MOST_BUCKETS:
        raise UsageError(f"{num_buckets} buckets were asked for; give 1 to {MOST_BUCKETS}.")
    done = Scattered(key_column=key_column)
    try:
        with ExitStack() as stack:
            writers = _Writers(folder, stack)
            for batch in batches:
                keys = [key_of(row) for row in batch.to_pylist()]
                if done.key_column is not None:
                    batch = writers.with_keys(batch, keys, done)
                places: dict[int, list[int]] = {}
                for place, key in enumerate(keys):
                    places.setdefault(bucket_of(key, num_buckets), []).append(place)
                for bucket, rows in places.items():
                    writers.add(bucket, batch.take(rows))
                    done.num_rows[bucket] += len(rows)
            writers.flush()
        for bucket in done.num_rows:
            done.size_bytes[bucket] = (bucket_folder(folder, bucket) / "rows.parquet").stat().st_size
    except OSError as error:
        raise not_written(folder, error) from error
    return done


class _Writers:
    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._writers: dict[int, Any] = {}
        self._waiting: dict[int, list[pa.RecordBatch]] = {}
        self._waiting_bytes = 0
        self._key_type: pa.DataType | None = None

    def with_keys(self, batch: "pa.RecordBatch", keys: list[object], done: Scattered) -> "pa.RecordBatch":
        """The batch with its keys as a column, where the first batch's keys are of a plain type."""
        import pyarrow as pa

        assert done.key_column is not None
        try:
            column = pa.array(keys, type=self._key_type)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
            if self._key_type is None:
                done.key_column = None  # tuples, mixed types: the key is computed when it is needed
                return batch
            raise InputError(
                f"The key's values change their type: {error}. Return one type for all rows, or apply with "
                "is_key_stored=False."
            ) from error
        is_same = list(map(comparable, column.to_pylist())) == list(map(comparable, keys))
        if not is_same and self._key_type is not None:
            raise InputError("A stored key is not what it was. Apply with is_key_stored=False.")
        if pa.types.is_nested(column.type) or pa.types.is_null(column.type) or not is_same:
            done.key_column = None
            return batch
        self._key_type = column.type
        return batch.append_column(done.key_column, column)

    def add(self, bucket: int, rows: "pa.RecordBatch") -> None:
        self._waiting.setdefault(bucket, []).append(rows)
        self._waiting_bytes += rows.nbytes
        if self._waiting_bytes > _BUFFERED_BYTES:
            self.flush()

    def flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for bucket, batches in self._waiting.items():
            table = pa.Table.from_batches(batches)
            if bucket not in self._writers:
                path = bucket_folder(self._folder, bucket) / "rows.parquet"
                make_folder(path.parent)
                self._writers[bucket] = self._stack.enter_context(pq.ParquetWriter(path, table.schema))
            self._writers[bucket].write_table(table)
        self._waiting.clear()
        self._waiting_bytes = 0
