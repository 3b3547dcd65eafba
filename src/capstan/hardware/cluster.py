"""Several machines and the network between every two of them, as matrices of latency and bandwidth."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from capstan.errors import InputError, UsageError, unknown_name
from capstan.hardware.machine import Device, Link
from capstan.hardware.units import gb_per_s, short_time

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True, repr=False)
class Cluster:
    """Machines by name; row = sender, column = receiver, so the two directions may differ.

    The matrices are nested tuples: a cluster is a value that can be compared, hashed and put into a
    plan. The diagonal stands for no link at all: whatever is given there is ignored, the latency reads
    0 and the bandwidth infinity. `devices` may tell the fast device of some or all of the machines.
    """

    names: tuple[str, ...]
    latency_s: Matrix
    bandwidth_bytes_per_s: Matrix
    devices: Mapping[str, Device] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        _require_names(self.names)
        latency = _square("latency_s", self.latency_s, len(self.names), diagonal=0.0)
        bandwidth = _square(
            "bandwidth_bytes_per_s", self.bandwidth_bytes_per_s, len(self.names), diagonal=math.inf
        )
        object.__setattr__(self, "latency_s", latency)
        object.__setattr__(self, "bandwidth_bytes_per_s", bandwidth)
        object.__setattr__(self, "devices", dict(self.devices))
        for name in self.devices:
            self._position(name)
        for source in range(len(self.names)):
            for target in range(len(self.names)):
                if source != target:
                    self._link(source, target)  # a link that cannot be made names what is wrong

    def link(self, source: str, target: str) -> Link:
        """The link from one machine to another."""
        if source == target:
            raise UsageError(f"{source!r} needs no link to itself; name two machines.")
        return self._link(self._position(source), self._position(target))

    def subset(self, names: Iterable[str]) -> "Cluster":
        """Only the machines of these names, in this order."""
        chosen = tuple(names)
        places = [self._position(name) for name in chosen]
        return Cluster(
            names=chosen,
            latency_s=_picked(self.latency_s, places),
            bandwidth_bytes_per_s=_picked(self.bandwidth_bytes_per_s, places),
            devices={name: device for name, device in self.devices.items() if name in chosen},
        )

    @classmethod
    def from_yaml(cls, path: Path) -> "Cluster":
        """The cluster that a file describes; `InputError` says what is wrong with which field."""
        from capstan.hardware.cluster_yaml import read_cluster

        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The cluster file {path} cannot be read: {error}.") from error
        return read_cluster(text, source=f"The cluster file {path}")

    def to_yaml(self) -> str:
        """The text of a file from which `from_yaml` gives back an equal cluster."""
        from capstan.hardware.cluster_yaml import write_cluster

        return write_cluster(self)

    def _position(self, name: str) -> int:
        if name not in self.names:
            raise unknown_name("machine", name, self.names)
        return self.names.index(name)

    def _link(self, source: int, target: int) -> Link:
        return Link(
            source=self.names[source],
            target=self.names[target],
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s[source][target],
            latency_s=self.latency_s[source][target],
        )

    def __repr__(self) -> str:
        first, last = self.names[0], self.names[-1]
        if len(self.names) == 1:
            return f"Cluster(1 machine: {first})"
        latencies, bandwidths = _off_diagonal(self.latency_s), _off_diagonal(self.bandwidth_bytes_per_s)
        return (
            f"Cluster({len(self.names)} machines: {first} … {last}, "
            f"{short_time(min(latencies))} to {short_time(max(latencies))}, "
            f"{gb_per_s(min(bandwidths))} to {gb_per_s(max(bandwidths))})"
        )


def _require_names(names: Sequence[str]) -> None:
    if not names:
        raise UsageError("A cluster needs at least one machine.")
    # Control characters and the like do not survive YAML, nor can a person tell them apart.
    odd = [name for name in names if not name or not name.isprintable()]
    if odd:
        raise UsageError(f"A machine's name is one or more printable characters, which {odd[0]!r} is not.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"A cluster names each machine once, but these come twice: {', '.join(twice)}.")


def _square(what: str, rows: Sequence[Sequence[float | None]], size: int, *, diagonal: float) -> Matrix:
    """The matrix as tuples of floats with its diagonal replaced."""
    if len(rows) != size:
        raise UsageError(f"{what} has {len(rows)} rows for {size} machines; give one row a machine.")
    for i, row in enumerate(rows):
        if len(row) != size:
            raise UsageError(
                f"Row {i} of {what} has {len(row)} numbers; give one for each of {size} machines."
            )
    return tuple(
        tuple(diagonal if i == j else _entry(what, i, j, value) for j, value in enumerate(row))
        for i, row in enumerate(rows)
    )


def _entry(what: str, row: int, column: int, value: float | None) -> float:
    if value is None:
        raise UsageError(f"{what} lacks row {row}, column {column}; only the diagonal may be empty.")
    return float(value)


def _picked(matrix: Matrix, places: list[int]) -> Matrix:
    return tuple(tuple(matrix[i][j] for j in places) for i in places)


def _off_diagonal(matrix: Matrix) -> list[float]:
    return [value for i, row in enumerate(matrix) for j, value in enumerate(row) if i != j]
