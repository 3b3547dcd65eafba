"""The same work before and after a layout: equal results, seconds, shuffled bytes."""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from capstan.errors import InputError, UsageError, require_extra
from capstan.partitioning.recording import collect
from capstan.partitioning.tables import Table, parquet_files
from capstan.plans import Phase, Trace, Traffic, link_name

Work = Callable[[Mapping[str, Table]], Iterable[Any]]
_SHUFFLE = (link_name("host", "disk"), "shuffled rows")


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was measured: medians of seconds, bytes of one run, and whether results are equal."""

    before: Phase
    after: Phase
    is_same: bool

    @property
    def speedup(self) -> float:
        """Seconds before / seconds after."""
        return self.before.seconds / self.after.seconds if self.after.seconds else 1.0

    @property
    def trace(self) -> Trace:
        """Both, as phases."""
        return Trace(
            system="partitioning",
            title="the same work before and after",
            machine="this machine",
            phases=(self.before, self.after),
            notes=("results are equal" if self.is_same else "results differ",),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "is_same": self.is_same,
            "speedup": self.speedup,
            **{
                phase.name: {
                    "seconds": phase.seconds,
                    "shuffled_bytes": phase.traffic.on(_SHUFFLE[0]),
                    "results": phase.counts["results"],
                }
                for phase in (self.before, self.after)
            },
            "trace": self.trace.to_dict(),
        }


def verify(work: Work, tables: Sequence[Table], *, repeats: int = 3) -> Verification:
    """Run `work` on the tables' sources and on their layouts, in turn, and compare.

    Results are compared as a collection: their order may differ.

    Args:
        work: takes tables by name, gives results; joins and groups inside are counted.
        tables: as `apply` or `open_table` gave them.
        repeats: runs of each; the medians count, the first of each warms up the files for both.

    Raises:
        InputError: no table has a layout.
    """
    if repeats < 1:
        raise UsageError(f"{repeats} repeats were asked for; give 1 or more.")
    if all(table.layout is None for table in tables):
        raise InputError(
            "None of these tables has a layout; there is nothing to verify. Make one with apply."
        )
    ways = {
        "before": {table.name: replace(table, layout=None, folder=None) for table in tables},
        "after": {table.name: table for table in tables},
    }
    runs: dict[str, list[tuple[float, int, int, int]]] = {"before": [], "after": []}
    for _ in range(repeats):
        for name, way in ways.items():
            runs[name].append(_run(work, way))
    phases = [_phase(name, each) for name, each in runs.items()]
    digests = {digest for each in runs.values() for _, _, _, digest in each}
    return Verification(before=phases[0], after=phases[1], is_same=len(digests) == 1)


def query(sql: str) -> Work:
    """Work that is an SQL query, run by DuckDB over the tables as views.

    DuckDB does not use the buckets; `verify` then shows that the layout costs its queries nothing.
    """

    def work(tables: Mapping[str, Table]) -> Iterable[Any]:
        require_extra("partitioning", "duckdb")
        import duckdb

        try:
            with duckdb.connect() as connection:
                for name, table in tables.items():
                    _view(connection, name, table)
                yield from connection.execute(sql).fetchall()
        except duckdb.Error as error:
            raise InputError(f"DuckDB cannot run this query: {error}") from error

    return work


def _view(connection: Any, name: str, table: Table) -> None:
    files = ", ".join(_quoted(str(path), "'") for path in table.files() or parquet_files(table.source))
    column = table.layout.key_column if table.layout is not None and table.files() else None
    chosen = f"* EXCLUDE ({_quoted(column, chr(34))})" if column else "*"
    read = f"read_parquet([{files}], hive_partitioning = false)"
    connection.execute(f"CREATE VIEW {_quoted(name, chr(34))} AS SELECT {chosen} FROM {read}")


def _quoted(text: str, mark: str) -> str:
    return mark + text.replace(mark, mark * 2) + mark


def _run(work: Work, tables: Mapping[str, Table]) -> tuple[float, int, int, int]:
    """Seconds, shuffled bytes, number of results, and a sum over them that no order changes."""
    with collect() as jobs:
        started_s = time.perf_counter()
        count, total = 0, 0
        for result in work(tables):
            count += 1
            total += int.from_bytes(hashlib.blake2b(repr(result).encode(), digest_size=16).digest(), "big")
        seconds = time.perf_counter() - started_s
    return seconds, sum(job.shuffle_bytes for job in jobs), count, total % 2**128 + (count << 128)


def _phase(name: str, runs: list[tuple[float, int, int, int]]) -> Phase:
    seconds = median(run[0] for run in runs)
    _, shuffled, count, _ = runs[-1]
    return Phase(
        name=name,
        seconds=seconds,
        traffic=Traffic({_SHUFFLE: shuffled} if shuffled else {}),
        counts={"results": count},
    )
