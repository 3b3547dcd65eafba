"""Inputs and labels from a file, or generated. NumPy, and pyarrow for Parquet."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from capstan.errors import InputError, UsageError, require_extra


class Samples(NamedTuple):
    """(samples, …) float32 inputs and (samples,) labels from 0."""

    inputs: NDArray[np.float32]
    labels: NDArray[np.int64]

    def scaled(self, scale: float) -> "Samples":
        """The same with all inputs times `scale`."""
        return Samples((self.inputs * scale).astype(np.float32), self.labels)

    def take(self, rows: NDArray[np.int64]) -> "Samples":
        """Some of them."""
        return Samples(self.inputs[rows], self.labels[rows])


def read_samples(
    path: Path, *, inputs: str | None, label: str | None, num_classes: int | None = None
) -> Samples:
    """The samples of a `.npz`, `.csv` or `.parquet` file.

    In a `.npz` file `inputs` and `label` name arrays (by default `inputs` and `labels`); in a table `label`
    names the column (by default the last), and all others are features. Labels of any kind become 0, 1, …
    in their order; but where the file is one of several, and may lack some of their `num_classes`, its labels
    must be numbers below that already.

    Raises:
        InputError: the file is not there, or not what it should be.
    """
    if not path.is_file():
        raise InputError(f"There is no data file {path}.")
    readers = {".npz": _read_npz, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise UsageError(f"Data come from {', '.join(readers)} files, found {path.name}.")
    try:
        values, labels = readers[path.suffix](path, inputs, label)
        features = np.ascontiguousarray(values, np.float32)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{path} cannot be read as numbers with a label each: {error}") from error
    if len(features) != len(labels) or not len(labels) or features.ndim < 2:
        raise InputError(
            f"{path}: wanted (samples, …) inputs and a label each, found {features.shape} and {labels.shape}."
        )
    if not np.isfinite(features).all():
        raise InputError(f"{path} has inputs that are no finite numbers. Fill or drop them first.")
    if num_classes is None:
        return Samples(features, np.unique(labels, return_inverse=True)[1].reshape(-1).astype(np.int64))
    return Samples(features, _checked_labels(labels, num_classes, path))


def generate_samples(samples: int, features: int, classes: int, noise: float, seed: int) -> Samples:
    """Patterns in noise: a class is a random curve over `features`, a sample its curve scaled and noisy."""
    rng = np.random.default_rng([seed, 6])
    steps = np.cumsum(rng.standard_normal((classes, features)), axis=1)
    curves = (steps - steps.mean(1, keepdims=True)) / steps.std(1, keepdims=True)
    labels = rng.permutation(np.arange(samples) % classes)
    scales = rng.uniform(0.7, 1.3, (samples, 1))
    inputs = curves[labels] * scales + noise * rng.standard_normal((samples, features))
    return Samples(inputs.astype(np.float32), labels.astype(np.int64))


def split_off_test(samples: Samples, fraction: float, seed: int) -> tuple[Samples, Samples]:
    """Those to train on, and `fraction` of each label to test with."""
    rng = np.random.default_rng([seed, 7])
    test: list[int] = []
    for label in np.unique(samples.labels):
        members = rng.permutation(np.flatnonzero(samples.labels == label))
        test.extend(members[: round(fraction * len(members))].tolist())
    is_test = np.zeros(len(samples.labels), np.bool_)
    is_test[test] = True
    return samples.take(np.flatnonzero(~is_test)), samples.take(np.flatnonzero(is_test))


def _read_npz(path: Path, inputs: str | None, label: str | None) -> tuple[NDArray[Any], NDArray[Any]]:
    with np.load(path, allow_pickle=False) as arrays:
        wanted = (inputs or "inputs", label or "labels")
        missing = [name for name in wanted if name not in arrays]
        if missing:
            raise InputError(f"{path} has no array {missing[0]!r}. It has: {', '.join(arrays.files)}.")
        return arrays[wanted[0]], arrays[wanted[1]]


def _read_csv(path: Path, inputs: str | None, label: str | None) -> tuple[NDArray[Any], NDArray[Any]]:
    with path.open(encoding="utf-8") as file:
        names = file.readline().strip().split(",")
    cells = np.loadtxt(path, delimiter=",", skiprows=1, dtype=str, ndmin=2)
    at = _column(names, label, path)
    return np.delete(cells, at, axis=1).astype(np.float32), _numbers(cells[:, at])


def _read_parquet(path: Path, inputs: str | None, label: str | None) -> tuple[NDArray[Any], NDArray[Any]]:
    require_extra("federation", "pyarrow")
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    at = _column(table.column_names, label, path)
    columns = [table.column(each).to_numpy() for each in range(table.num_columns) if each != at]
    return np.stack(columns, axis=1), table.column(at).to_numpy()


def _checked_labels(labels: NDArray[Any], num_classes: int, path: Path) -> NDArray[np.int64]:
    known = np.arange(num_classes)
    if labels.dtype.kind not in "biuf" or not np.isin(labels, known).all():
        strange = [each for each in np.unique(labels).tolist() if each not in known.tolist()]
        raise InputError(
            f"{path}: a device's labels are whole numbers from 0 to {num_classes - 1}, the same on all "
            f"devices; found {strange[0]!r}. Number them first."
        )
    return labels.reshape(-1).astype(np.int64)


def _column(names: list[str], label: str | None, path: Path) -> int:
    if label is None:
        return len(names) - 1
    if label not in names:
        raise InputError(f"{path} has no column {label!r}. It has: {', '.join(names)}.")
    return names.index(label)


def _numbers(cells: NDArray[Any]) -> NDArray[Any]:
    try:  # so that 10 comes after 9
        return cells.astype(np.float64)
    except ValueError:
        return cells
