"""A Parquet file of labelled samples, read batch by batch in the order of the file."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from capstan.errors import InputError, require_extra, unknown_name
from capstan.recommendation.bags import Bags
from capstan.recommendation.batch_reader import read_bags
from capstan.recommendation.training_config import RecommenderConfig


@dataclass(frozen=True, kw_only=True)
class Samples:
    """`dense` is float32 `[samples, columns]`, `labels` float32 of 0 and 1 `[samples]`."""

    bags: dict[str, Bags]
    dense: np.ndarray
    labels: np.ndarray


class ClickLog:
    """A Parquet file seen through a configuration. Only the batch being read is in memory."""

    def __init__(self, path: Path, config: RecommenderConfig) -> None:
        require_extra("recommendation", "pyarrow")
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.config = path, config
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f"{path} cannot be read as Parquet: {error}.") from error
        known = self._file.schema_arrow.names
        for name in config.columns:
            if name not in known:
                raise unknown_name(f"column in {path}", name, known)

    @property
    def num_samples(self) -> int:
        return int(self._file.metadata.num_rows)

    def batches(self, batch_size: int) -> Iterator[Samples]:
        """Every sample once, `batch_size` at a time; the last batch may be smaller."""
        for batch in self._file.iter_batches(batch_size=batch_size, columns=self.config.columns):
            yield self._samples(batch)

    def _samples(self, batch: Any) -> Samples:
        columns = {slot: _ids(batch.column(self.config.column_of(slot))) for slot in self.config.slots}
        dense = [self._dense(batch.column(name), name) for name in self.config.dense]
        return Samples(
            bags=read_bags(columns, list(self.config.slots)),
            dense=np.stack(dense, 1) if dense else np.empty((len(batch), 0), np.float32),
            labels=self._labels(batch.column(self.config.label)),
        )

    def _dense(self, column: Any, name: str) -> np.ndarray:
        values = column.to_numpy(zero_copy_only=False)
        if values.dtype.kind not in "iufb":
            raise InputError(
                f"Column {name!r} of {self.path} is {column.type}; a dense column needs numbers."
            )
        numbers: np.ndarray = values.astype(np.float32)
        if not np.isfinite(numbers).all():
            raise InputError(
                f"Column {name!r} of {self.path} has values that are missing or not finite. Fill them in, "
                "for example with 0 and a column that says so."
            )
        return numbers

    def _labels(self, column: Any) -> np.ndarray:
        if column.null_count:
            raise InputError(f"The label {self.config.label!r} of {self.path} is missing in some samples.")
        values = column.to_numpy(zero_copy_only=False)
        if self.config.positive is not None:
            return np.array([str(each).strip() == self.config.positive for each in values], dtype=np.float32)
        if values.dtype.kind not in "iufb" or not np.isin(values, (0, 1)).all():
            raise InputError(
                f"The label {self.config.label!r} of {self.path} must be 0 or 1. If it is something else, "
                "say with `positive:` which value counts as 1."
            )
        found: np.ndarray = values.astype(np.float32)
        return found


def _ids(column: Any) -> Any:
    """Integers as they are; strings, alone or in lists, become 64-bit hashes."""
    import pyarrow as pa
    import pyarrow.types as kinds

    if kinds.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if kinds.is_string(column.type) or kinds.is_large_string(column.type):
        encoded = column.dictionary_encode()
        hashes = pa.array([string_id(each) for each in encoded.dictionary.to_pylist()], pa.uint64())
        return hashes.take(encoded.indices)
    if kinds.is_list(column.type) or kinds.is_large_list(column.type):
        inner = column.flatten()
        if kinds.is_string(inner.type) or kinds.is_large_string(inner.type):
            lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
            values = _ids(inner)
            if values.null_count:
                raise InputError(f"Lists of IDs have {values.null_count} nulls in them; take them out.")
            return values.to_numpy(zero_copy_only=False), np.concatenate(
                [[0], np.cumsum(lengths, dtype=np.int64)]
            )
    return column


@lru_cache(maxsize=1 << 16)
def string_id(text: str) -> int:
    """The ID of a string, blanks around it left out: the first 8 bytes of its BLAKE2b, little-endian.

    The same in every file and process, so train and test need no common encoder; that two of n strings
    share an ID has a probability of n² / 2⁶⁵.
    """
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "little")
