"""Rows of a table as examples: a matrix of features and a label, standardised by one pass over the table.

A standardised feature is (value - mean) / standard deviation, over all rows; one that never changes is 0. For
linear regression the label is standardised as well, and predictions are turned back. The statistics are exact
and taken in stored order before the first epoch, because on clustered data those of the first blocks would
be of one cluster.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capstan.errors import InputError, UsageError, unknown_name
from capstan.shuffling.order import Piece
from capstan.shuffling.reading import Account, read_piece, row_count
from capstan.storage import BlockSource, Rows

Floats = NDArray[np.float64]
_MOST_CLASSES = 10_000


@dataclass(frozen=True, kw_only=True)
class Examples:
    """How rows become examples.

    `widths` are the numbers of each feature column; `classes` are the label's values in ascending order, and
    none for regression.
    """

    label: str
    features: tuple[str, ...]
    widths: tuple[int, ...]
    mean: Floats
    scale: Floats
    classes: tuple[Any, ...] = ()
    label_mean: float = 0.0
    label_scale: float = 1.0

    @property
    def num_features(self) -> int:
        """Numbers of an example."""
        return sum(self.widths)

    def x(self, rows: Rows) -> Floats:
        """(rows, features): standardised."""
        return (matrix(rows, self.features, self.widths) - self.mean) * self.scale

    def y(self, rows: Rows) -> NDArray[np.int64] | Floats:
        """(rows,): the number of the class, -1 for one that is not known; or the standardised value."""
        values = _labels(rows, self.label)
        if not self.classes:
            return (values.astype(np.float64) - self.label_mean) / self.label_scale
        known = np.asarray(self.classes)
        at = np.minimum(np.searchsorted(known, values), len(known) - 1)
        return np.where(known[at] == values, at, -1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, where floats survive exactly: Python writes as many digits as they need."""
        return {
            "label": self.label,
            "features": list(self.features),
            "widths": list(self.widths),
            "mean": self.mean.tolist(),
            "scale": self.scale.tolist(),
            "classes": list(self.classes),
            "label_mean": self.label_mean,
            "label_scale": self.label_scale,
        }

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> "Examples":
        """What `to_dict` told of."""
        return cls(
            label=told["label"],
            features=tuple(told["features"]),
            widths=tuple(told["widths"]),
            mean=np.array(told["mean"]),
            scale=np.array(told["scale"]),
            classes=tuple(told["classes"]),
            label_mean=told["label_mean"],
            label_scale=told["label_scale"],
        )


def choose_columns(
    rows: Rows, *, label: str, features: Sequence[str] | None = None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Feature columns and their widths: those asked for, or every numeric column but the label.

    Raises:
        UsageError: the label or a feature is not there, or is no number; or there is no feature.
    """
    if label not in rows:
        raise unknown_name("column (for the label)", label, rows)
    if rows[label].ndim != 1:
        raise UsageError(f"The label {label!r} is a list in every row; wanted one value.")
    for name in features or ():
        if name not in rows:
            raise unknown_name("column (for a feature)", name, rows)
        if name == label:
            raise UsageError(f"{name!r} is the label, so it cannot be a feature.")
        if not _is_numeric(rows[name]):
            raise UsageError(f"Feature {name!r} is {rows[name].dtype}; wanted numbers. Encode it before.")
    chosen = tuple(
        features if features is not None else (n for n in rows if n != label and _is_numeric(rows[n]))
    )
    if not chosen:
        raise UsageError(f"No column beside the label {label!r} is numeric: {', '.join(rows)}.")
    return chosen, tuple(int(np.prod(rows[name].shape[1:], dtype=np.int64)) for name in chosen)


def matrix(rows: Rows, features: Sequence[str], widths: Sequence[int]) -> Floats:
    """(rows, sum of widths): the feature columns beside one another.

    A sparse file's column may be narrower than `widths`, the rest being zeros, or wider, the rest having no
    weight.

    Raises:
        InputError: a value that is not finite.
    """
    found = np.zeros((row_count(rows), sum(widths)))
    at = 0
    for name, width in zip(features, widths, strict=True):
        if name not in rows:
            raise unknown_name("column (for a feature)", name, rows)
        values = rows[name].reshape(len(found), -1)[:, :width]
        found[:, at : at + values.shape[1]] = values
        at += width
    if not np.isfinite(found).all():
        columns = np.repeat(np.array(features), widths)
        bad = str(columns[np.flatnonzero(~np.isfinite(found).all(axis=0))[0]])
        raise InputError(f"Feature {bad!r} has values that are not finite. Fill them before.")
    return found


def _is_numeric(column: NDArray[np.generic]) -> bool:
    return column.dtype.kind in "biuf"


def _labels(rows: Rows, label: str) -> NDArray[np.generic]:
    if label not in rows:
        raise unknown_name("column (for the label)", label, rows)
    values = rows[label]
    if values.dtype.kind == "O":
        values = values.astype(str)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InputError(f"The label {label!r} has values that are not finite. Fill them, or leave them out.")
    return values


@dataclass
class _Moments:
    """Number, mean and sum of squared deviations of rows, joined block by block (Chan et al. 1979)."""

    count: int = 0
    mean: Floats = field(default_factory=lambda: np.zeros(0))
    squares: Floats = field(default_factory=lambda: np.zeros(0))

    def add(self, values: Floats) -> None:
        count, mean = len(values), values.mean(axis=0)
        squares = ((values - mean) ** 2).sum(axis=0)
        if not self.count:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total, apart = self.count + count, mean - self.mean
        self.mean = self.mean + apart * (count / total)
        self.squares = self.squares + squares + apart**2 * (self.count * count / total)
        self.count = total

    @property
    def scale(self) -> Floats:
        """1 / standard deviation, 0 where there is none."""
        deviation = np.sqrt(self.squares / self.count)
        # What rounding alone makes of equal values is no deviation.
        still = deviation <= 1e-12 * np.abs(self.mean)
        return np.where(still, 0.0, 1.0 / np.where(still, 1.0, deviation))


def survey(
    source: BlockSource,
    *,
    label: str,
    is_regression: bool,
    features: Sequence[str] | None = None,
    account: Account | None = None,
) -> Examples:
    """One pass over the table in stored order: columns, means, deviations and classes.

    Raises:
        InputError: a value is not finite, or the label has too many classes.
        UsageError: see `choose_columns`.
    """
    account = account or Account()
    moments, of_label, classes = _Moments(), _Moments(), set[Any]()
    chosen: tuple[tuple[str, ...], tuple[int, ...]] | None = None
    for block in range(source.num_blocks):
        size = source.num_rows(block)
        if not size:
            continue
        rows = read_piece(source, Piece(block=block, rows=slice(0, size)), account)
        if chosen is None:
            chosen = choose_columns(rows, label=label, features=features)
        moments.add(matrix(rows, *chosen))
        values = _labels(rows, label)
        if is_regression:
            if not _is_numeric(values):
                raise UsageError(f"The label {label!r} is {values.dtype}; linear regression wants numbers.")
            of_label.add(values.astype(np.float64)[:, None])
        else:
            classes |= set(np.unique(values).tolist())
        if len(classes) > _MOST_CLASSES:
            raise InputError(
                f"The label {label!r} has more than {_MOST_CLASSES:,} different values. Classes are wanted; "
                "for a quantity take --model linear."
            )
    assert chosen is not None, "a source has rows"
    spread = float(of_label.scale[0]) if is_regression else 1.0
    return Examples(
        label=label,
        features=chosen[0],
        widths=chosen[1],
        mean=moments.mean,
        scale=moments.scale,
        classes=tuple(sorted(classes)),
        label_mean=float(of_label.mean[0]) if is_regression else 0.0,
        label_scale=1.0 / spread if spread else 1.0,
    )
