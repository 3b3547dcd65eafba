"""What ran before: jobs, their keys, sizes, selectivity and seconds, in one SQLite file.

Source: Lachesis, arXiv 2006.16529, its historical store.
Differs: a run knows the layout that it ran under, so that measured layouts can be compared; computations are
kept as identities of key terms, not as serialised code.
"""

import json
import math
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from capstan.errors import DoesNotFit, InputError, UsageError

VERSION = 1
_APPLICATION = 0x43415050  # "CAPP", written into the file: another program's SQLite file is not ours
_TABLES = """
CREATE TABLE job_run (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, kind TEXT NOT NULL, seconds REAL NOT NULL,
    shuffle_s REAL, shuffle_bytes INTEGER NOT NULL, result_rows INTEGER, layout TEXT NOT NULL
);
CREATE TABLE side (
    run INTEGER NOT NULL REFERENCES job_run(id), place INTEGER NOT NULL, table_name TEXT NOT NULL,
    key TEXT NOT NULL, key_text TEXT NOT NULL, level TEXT NOT NULL, is_reusable INTEGER NOT NULL,
    num_rows INTEGER NOT NULL, size_bytes INTEGER NOT NULL, num_keys INTEGER, largest_share REAL,
    PRIMARY KEY (run, place)
);
"""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One input of a job: the table, the key that it is joined or grouped by, and how much it is.

    `key` is the identity of the key; `largest_share` the share of rows that the most frequent key has.
    """

    table: str
    key: str
    key_text: str = ""
    level: str = "traced"
    is_reusable: bool = True
    num_rows: int = 0
    size_bytes: int = 0
    num_keys: int | None = None
    largest_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class JobRun:
    """One run of a job. `layout` maps the tables that were partitioned to the key's identity."""

    name: str
    kind: str
    seconds: float
    sides: tuple[Side, ...] = ()
    layout: Mapping[str, str] = field(default_factory=dict)
    shuffle_s: float | None = None
    shuffle_bytes: int = 0
    result_rows: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise UsageError(f"Job {self.name!r} took {self.seconds} s; give a finite time of 0 or more.")
        if self.kind not in {"join", "group", "query"}:
            raise UsageError(f"A job is a join, a group or a query, not {self.kind!r}.")

    @property
    def selectivity(self) -> float | None:
        """Result rows for each input row."""
        rows = sum(side.num_rows for side in self.sides)
        return self.result_rows / rows if self.result_rows is not None and rows else None


class History:
    """A file of job runs. Opened for each call, in write-ahead mode: several processes may add to it."""

    def __init__(self, path: Path | str, *, create: bool = False) -> None:
        self.path = Path(path)
        if not create and not self.path.is_file():
            raise InputError(
                f"There is no history {self.path}. Record one: with record({str(self.path)!r}): ..."
            )
        with self._connection() as connection:
            self._prepare(connection)

    def add(self, run: JobRun) -> None:
        """Add one run, whole or not at all."""
        self.extend([run])

    def extend(self, runs: list[JobRun]) -> None:
        """Add runs, all or none.

        Raises:
            DoesNotFit: the disk is full.
            InputError: the file is not a history.
        """
        with self._connection() as connection, connection:
            for run in runs:
                added = connection.execute(
                    "INSERT INTO job_run (name, kind, seconds, shuffle_s, shuffle_bytes, result_rows, layout)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        run.name,
                        run.kind,
                        run.seconds,
                        run.shuffle_s,
                        run.shuffle_bytes,
                        run.result_rows,
                        json.dumps(dict(run.layout), sort_keys=True),
                    ),
                )
                rows = [
                    (added.lastrowid, place, *asdict(side).values()) for place, side in enumerate(run.sides)
                ]
                connection.executemany("INSERT INTO side VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def runs(self) -> list[JobRun]:
        """All runs, in the order in which they were added."""
        with self._connection() as connection:
            sides: dict[int, list[Side]] = {}
            for run, _, *values in connection.execute("SELECT * FROM side ORDER BY run, place"):
                sides.setdefault(run, []).append(_side(values))
            found = connection.execute(
                "SELECT id, name, kind, seconds, shuffle_s, shuffle_bytes, result_rows, layout"
                " FROM job_run ORDER BY id"
            )
            return [
                JobRun(
                    name=name,
                    kind=kind,
                    seconds=seconds,
                    shuffle_s=shuffle_s,
                    shuffle_bytes=shuffle_bytes,
                    result_rows=result_rows,
                    layout=self._layout(layout),
                    sides=tuple(sides.get(number, ())),
                )
                for number, name, kind, seconds, shuffle_s, shuffle_bytes, result_rows, layout in found
            ]

    def _layout(self, text: str) -> dict[str, str]:
        try:
            layout = json.loads(text)
        except ValueError as error:
            raise self._damaged(error) from error
        return {str(table): str(key) for table, key in layout.items()}

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=30)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA foreign_keys=ON")
                yield connection
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise DoesNotFit(
                    f"The disk of {self.path} is full. Free space there; no run was added."
                ) from error
            raise InputError(
                f"The history {self.path} cannot be used: {error}. Name another place."
            ) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> InputError:
        return InputError(
            f"{self.path} is not a history of Capstan, or it is damaged: {error}. "
            "Move it away and record anew."
        )

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Make the tables of a new file; refuse another program's, and other versions."""
        with connection:
            connection.execute("BEGIN IMMEDIATE")  # two processes may open a new file at once
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            (num_tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if (application, version) == (_APPLICATION, VERSION):
                return
            if application == _APPLICATION:
                raise InputError(
                    f"{self.path} has version {version}; this Capstan reads {VERSION}. Record anew."
                )
            if num_tables:
                raise InputError(f"{self.path} is another program's SQLite file. Name another place.")
            for statement in filter(str.strip, _TABLES.split(";")):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id={_APPLICATION}")
            connection.execute(f"PRAGMA user_version={VERSION}")


def _side(values: list[object]) -> Side:
    table, key, key_text, level, is_reusable, num_rows, size_bytes, num_keys, largest_share = values
    return Side(
        table=str(table),
        key=str(key),
        key_text=str(key_text),
        level=str(level),
        is_reusable=bool(is_reusable),
        num_rows=int(num_rows),  # type: ignore[call-overload]
        size_bytes=int(size_bytes),  # type: ignore[call-overload]
        num_keys=num_keys,  # type: ignore[arg-type]
        largest_share=largest_share,  # type: ignore[arg-type]
    )
