"""JSON lines and LIBSVM files as blocks of lines."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capstan.errors import InputError
from capstan.shuffling.files import RangedFile
from capstan.shuffling.line_index import kept_index
from capstan.shuffling.sources import FileBlocks, chosen_columns, cut


class _Lines(FileBlocks):
    """Blocks of lines; their bytes are the lines as they are stored."""

    counts_features = False

    def __init__(self, file: RangedFile, rows_per_block: int | None, columns: Sequence[str] | None) -> None:
        self._starts, self.largest_feature = kept_index(file, counts_features=self.counts_features)
        sizes = cut(len(self._starts) - 1, rows_per_block)
        self._first_lines = np.append(0, np.cumsum(sizes)).astype(np.int64)
        self._columns: tuple[str, ...] = ()
        super().__init__(file, sizes, "")
        self._columns = chosen_columns(file, self._names(), columns)
        self._layout = f"lines|{self._columns}|{self.largest_feature}"

    @property
    def columns(self) -> tuple[str, ...]:
        return self._columns

    def _names(self) -> list[str]:
        raise NotImplementedError

    def _size_bytes(self, block: int) -> int:
        start, stop = self._range(block)
        return stop - start

    def _range(self, block: int) -> tuple[int, int]:
        first, last = self._first_lines[block : block + 2]
        return int(self._starts[first]), int(self._starts[last])

    def _lines(self, first: int, last: int) -> list[bytes]:
        start, stop = int(self._starts[first]), int(self._starts[last])
        data = self.file.read(start, stop - start)
        return [
            data[a - start : b - start]
            for a, b in zip(self._starts[first:last], self._starts[first + 1 :], strict=False)
        ]

    def _wrong(self, line: int, found: str) -> InputError:
        return InputError(f"{self.file}, line {line + 1} (empty lines not counted): {found}")


class JsonLines(_Lines):
    """One JSON object a line, each with the keys of the first: numbers, texts, truth values, or lists of
    equally many numbers."""

    def _names(self) -> list[str]:
        return list(self._row(0, self._lines(0, 1)[0]))

    def _row(self, line: int, text: bytes) -> dict[str, Any]:
        try:
            row = json.loads(text)
        except ValueError as error:
            raise self._wrong(line, f"this is not JSON: {error}. Mend the line.") from error
        if not isinstance(row, dict):
            raise self._wrong(line, f"wanted an object, found {type(row).__name__}.")
        return row

    def _read(self, block: int) -> dict[str, NDArray[np.generic]]:
        first, last = (int(line) for line in self._first_lines[block : block + 2])
        rows = [self._row(first + at, text) for at, text in enumerate(self._lines(first, last))]
        return {name: self._column(name, rows, first) for name in self._columns}

    def _column(self, name: str, rows: list[dict[str, Any]], first: int) -> NDArray[np.generic]:
        values = []
        for at, row in enumerate(rows):
            if row.get(name) is None:
                what = "is null" if name in row else "is missing"
                raise self._wrong(first + at, f"{name!r} {what}. Fill it, or leave the column out.")
            values.append(row[name])
        try:
            array = np.asarray(values)
        except ValueError:
            array = np.asarray(None)
        if array.dtype.kind not in "biufU" or array.ndim > 2:
            raise self._wrong(first, f"{name!r} is not a number, a text or a list of numbers in every row.")
        kinds = {type(value) for value in values}
        if str in kinds and len(kinds) > 1:
            raise self._wrong(first, f"{name!r} is a text in some rows and a number in others.")
        return array


class LibsvmLines(_Lines):
    """`label index:value index:value …` a line, as the columns `label` and `x`.

    `x` is dense, float32 of shape (rows, largest index + 1): an index is a column's number, whether a file
    counts from 0 or from 1. What follows `#` is left out.
    """

    counts_features = True

    def _names(self) -> list[str]:
        return ["label", "x"]

    def _read(self, block: int) -> dict[str, NDArray[np.generic]]:
        first, last = (int(line) for line in self._first_lines[block : block + 2])
        labels = np.empty(last - first)
        x = np.zeros((last - first, self.largest_feature + 1), np.float32)
        for at, text in enumerate(self._lines(first, last)):
            label, *pairs = text.partition(b"#")[0].split() or [b""]
            try:
                labels[at] = float(label)
                for pair in pairs:
                    index, _, value = pair.partition(b":")
                    if index != b"qid":
                        x[at, int(index)] = float(value)
            except (ValueError, IndexError) as error:
                raise self._wrong(
                    first + at, f"wanted `label index:value …`, found {text[:60].decode(errors='replace')!r}."
                ) from error
        found: dict[str, NDArray[np.generic]] = {"label": labels, "x": x}
        return {name: found[name] for name in self._columns}
