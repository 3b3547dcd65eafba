"""A cluster from a file: the YAML of `Cluster`, or a table of pairs in CSV."""

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from capstan.errors import InputError, UsageError
from capstan.hardware import Cluster

COLUMNS = ("source", "target", "latency_s", "bandwidth_bytes_per_s")


class _Row(NamedTuple):
    source: str
    target: str
    latency_s: float
    bandwidth_bytes_per_s: float


def read_cluster_file(path: Path) -> Cluster:
    """The cluster that a `.yaml`, `.yml` or `.csv` file describes.

    The CSV has a line `source,target,latency_s,bandwidth_bytes_per_s` and then one for each pair of devices.
    Devices are numbered as they first appear. A pair given in one direction only is the same in both.

    Raises:
        InputError: the file cannot be read, or says what no cluster can be; the message names the line.
        UsageError: its name ends in something else.
    """
    path = Path(path)
    if path.suffix in {".yaml", ".yml"}:
        return Cluster.from_yaml(path)
    if path.suffix != ".csv":
        raise UsageError(f"{path} is neither .yaml nor .csv; a cluster is read from one of these.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The cluster file {path} cannot be read: {error}.") from error
    return _cluster(list(_rows(text, path)), path)


def _rows(text: str, path: Path) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(text))
    header = tuple(cell.strip() for cell in next(reader, []))
    if header != COLUMNS:
        raise InputError(
            f"{path} should begin with the line {','.join(COLUMNS)} but begins with "
            f"{','.join(header) or 'nothing'}."
        )
    for cells in reader:
        where = f"{path}, line {reader.line_num}"
        if not cells:
            continue
        if len(cells) != len(COLUMNS):
            raise InputError(f"{where} should have {len(COLUMNS)} cells but has {len(cells)}.")
        source, target = cells[0].strip(), cells[1].strip()
        if source == target:
            raise InputError(f"{where} is a link from {source!r} to itself; name two devices.")
        yield _Row(source, target, _number(cells[2], where), _number(cells[3], where))


def _number(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{where} should have a finite number where it has {cell.strip()!r}.")
    return value


def _cluster(rows: list[_Row], path: Path) -> Cluster:
    names = tuple(dict.fromkeys(name for row in rows for name in (row.source, row.target)))
    if not names:
        raise InputError(f"{path} has no pair of devices; give a line for each.")
    links: dict[tuple[str, str], _Row] = {}
    for row in rows:
        if (row.source, row.target) in links:
            raise InputError(f"{path} has {row.source} -> {row.target} twice; give each direction once.")
        links[row.source, row.target] = row

    def link(source: str, target: str) -> _Row:
        if source == target:
            return _Row(source, target, 0.0, math.inf)
        found = links.get((source, target)) or links.get((target, source))
        if found is None:
            raise InputError(
                f"{path} lacks the pair {source}, {target}; {len(names)} devices have "
                f"{len(names) * (len(names) - 1) // 2} pairs."
            )
        return found

    matrix = [[link(source, target) for target in names] for source in names]
    try:
        return Cluster(
            names=names,
            latency_s=tuple(tuple(each.latency_s for each in row) for row in matrix),
            bandwidth_bytes_per_s=tuple(tuple(each.bandwidth_bytes_per_s for each in row) for row in matrix),
        )
    except UsageError as error:
        raise InputError(f"{path} describes no possible cluster. {error}") from error
