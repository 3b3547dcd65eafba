"""Parquet row groups and Arrow record batches as blocks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capstan.errors import InputError, require_extra
from capstan.shuffling.files import RangedFile
from capstan.shuffling.sources import FileBlocks, chosen_columns, joined


class ParquetBlocks(FileBlocks):
    """Row groups of a Parquet file. Its bytes are those of the chosen columns' chunks, as they are stored."""

    def __init__(self, file: RangedFile, rows_per_block: int | None, columns: Sequence[str] | None) -> None:
        require_extra("shuffling", "pyarrow")
        import pyarrow.parquet as pq

        with _understanding(file, "Parquet"), _for_arrow(file) as opened:
            metadata = self._metadata = pq.read_metadata(opened)
            schema = metadata.schema.to_arrow_schema()
        self._columns = chosen_columns(file, schema.names, columns)
        sizes = [metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)]
        self._groups = joined(sizes, rows_per_block)
        layout = f"parquet|{self._columns}|{schema}"
        super().__init__(file, [sum(sizes[at] for at in group) for group in self._groups], layout)

    @property
    def columns(self) -> tuple[str, ...]:
        return self._columns

    def _size_bytes(self, block: int) -> int:
        wanted, total = set(self._columns), 0
        for at in self._groups[block]:
            group = self._metadata.row_group(at)
            for index in range(group.num_columns):
                chunk = group.column(index)
                path: str = chunk.path_in_schema  # of a list: its name, ".list.element"
                if path in wanted or path.partition(".")[0] in wanted:
                    total += chunk.total_compressed_size
        return int(total)

    def _range(self, block: int) -> tuple[int, int]:
        chunks = [
            self._metadata.row_group(at).column(index)
            for at in self._groups[block]
            for index in range(self._metadata.num_columns)
        ]
        starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
        ends = [s + chunk.total_compressed_size for s, chunk in zip(starts, chunks, strict=True)]
        return (min(starts), max(ends)) if starts else (0, 0)

    def _read(self, block: int) -> dict[str, NDArray[np.generic]]:
        import pyarrow.parquet as pq

        # Opened for each block: a process that was forked meanwhile shares nothing with this one.
        with _understanding(self.file, "Parquet"), _for_arrow(self.file) as opened:
            table = pq.ParquetFile(opened, metadata=self._metadata).read_row_groups(
                list(self._groups[block]), columns=list(self._columns)
            )
        self.file.bytes_read += self._size_bytes(block)
        return _as_arrays(self.file, table, block)


class ArrowBlocks(FileBlocks):
    """Record batches of an Arrow IPC file, memory-mapped if it is here. A block's bytes are its buffers'."""

    def __init__(self, file: RangedFile, rows_per_block: int | None, columns: Sequence[str] | None) -> None:
        require_extra("shuffling", "pyarrow")
        import pyarrow as pa

        with _understanding(file, "Arrow IPC"), _for_arrow(file) as opened:
            reader = pa.ipc.open_file(opened)
            schema = reader.schema
            self._columns = chosen_columns(file, schema.names, columns)
            sizes, stored = [], []
            for at in range(reader.num_record_batches):
                batch = reader.get_batch(at)
                sizes.append(batch.num_rows)
                stored.append(batch.select(list(self._columns)).nbytes)
        self._groups = joined(sizes, rows_per_block)
        self._stored: list[int] = [sum(stored[at] for at in group) for group in self._groups]
        layout = f"arrow|{self._columns}|{schema}"
        super().__init__(file, [sum(sizes[at] for at in group) for group in self._groups], layout)

    @property
    def columns(self) -> tuple[str, ...]:
        return self._columns

    def _size_bytes(self, block: int) -> int:
        return self._stored[block]

    def _range(self, block: int) -> tuple[int, int]:
        return 0, 0

    def _read(self, block: int) -> dict[str, NDArray[np.generic]]:
        import pyarrow as pa

        with _understanding(self.file, "Arrow IPC"), _for_arrow(self.file) as opened:
            reader = pa.ipc.open_file(opened)
            batches = [reader.get_batch(at) for at in self._groups[block]]
            table = pa.Table.from_batches(batches).select(list(self._columns))
            self.file.bytes_read += self._stored[block]
            return _as_arrays(self.file, table, block)


@contextmanager
def _understanding(file: RangedFile, kind: str) -> Iterator[None]:
    """An error of pyarrow becomes one that names the file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(
            f"{file} cannot be read as {kind}: {reason} It may be cut short or damaged: write it again."
        ) from error


@contextmanager
def _for_arrow(file: RangedFile) -> Iterator[Any]:
    """The file as pyarrow reads it fastest: memory-mapped where it is here."""
    import pyarrow as pa

    with file.open() if file.is_remote else pa.memory_map(file.name) as opened:
        yield opened


def _as_arrays(file: RangedFile, table: Any, block: int) -> dict[str, NDArray[np.generic]]:
    found = {}
    for name in table.column_names:
        column = table.column(name)
        if column.null_count:
            raise InputError(
                f"Column {name!r} of {file} has {column.null_count} NULLs in block {block}. Fill them "
                "before, or leave the column out."
            )
        found[name] = _as_array(file, name, column)
    return found


def _as_array(file: RangedFile, name: str, column: Any) -> NDArray[np.generic]:
    """One array; lists, which must be equally long, become its second dimension."""
    import pyarrow as pa

    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        array: NDArray[np.generic] = column.to_numpy()
        return array
    column = column.combine_chunks()
    values = column.flatten()
    if values.null_count:
        raise InputError(f"Lists of column {name!r} of {file} hold NULLs. Fill them before.")
    lengths = set(column.value_lengths().to_pylist())
    if len(lengths) != 1:
        raise InputError(
            f"Lists of column {name!r} of {file} have {min(lengths)} to {max(lengths)} values; a feature "
            "needs equally many in every row."
        )
    flat: NDArray[np.generic] = values.to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), lengths.pop())
