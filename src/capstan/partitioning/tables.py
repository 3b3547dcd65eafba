"""Tables of Parquet files, plain or laid out in buckets by a key."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capstan.errors import InputError, require_extra
from capstan.partitioning.buckets import HASH
from capstan.partitioning.reading import Key
from capstan.partitioning.scattering import bucket_folder

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "layout.json"
FORMAT = "capstan.layout"
VERSION = 1
_BATCH_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a table lies in buckets. `key` is the key's identity, `data` the folder of its rows."""

    key: str
    key_text: str
    num_buckets: int
    data: str
    key_column: str | None
    num_rows: dict[str, int] = field(hash=False)
    hash: str = HASH

    @property
    def skew(self) -> float:
        """Rows of the largest bucket / rows of a bucket on average: what bounds memory."""
        total = sum(self.num_rows.values())
        return max(self.num_rows.values()) * self.num_buckets / total if total else 1.0


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows in Parquet files, in buckets where there is a `layout`. `row` makes a row of its columns."""

    name: str
    source: Path
    folder: Path | None = None
    layout: Layout | None = None
    row: Callable[..., Any] | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of the files that are read."""
        return sum(path.stat().st_size for path in self.files() if path.exists())

    def files(self) -> list[Path]:
        """The Parquet files, in order; none of an empty layout."""
        return parquet_files(self.source) if self.layout is None else self.bucket_files(0, 1)

    def bucket_files(self, bucket: int, num_buckets: int) -> list[Path]:
        """Files of a bucket out of `num_buckets`, which divides the layout's number."""
        assert self.layout is not None
        assert self.folder is not None
        numbers = range(bucket, self.layout.num_buckets, num_buckets)
        # By the manifest, not by what is there: a file that was lost is an error, not a bucket without rows.
        filled = [each for each in numbers if self.layout.num_rows.get(str(each))]
        return [bucket_folder(self.folder / self.layout.data, each) / "rows.parquet" for each in filled]

    def lies_by(self, key: Key) -> bool:
        """Whether the layout is by this very key and this hash function."""
        layout = self.layout
        return layout is not None and key.is_reusable and (layout.key, layout.hash) == (key.identity, HASH)

    def require(self, key: Key) -> None:
        """Refuse a layout that is not by `key`.

        Raises:
            InputError: there is no layout, or it is by another key, or by this one before it was changed.
        """
        if not self.lies_by(key):
            found = "no layout" if self.layout is None else f"a layout by {self.layout.key_text}"
            raise InputError(
                f"Table {self.name!r} was wanted by {key}, and has {found}. If the function was changed, the "
                "layout is stale: apply it again."
            )

    def to_row(self, columns: dict[str, Any]) -> Any:
        """A row as the user's functions see it."""
        return columns if self.row is None else self.row(**columns)


def open_table(path: Path | str, *, name: str | None = None, row: Callable[..., Any] | None = None) -> Table:
    """Open a Parquet file, a folder of them, or a folder that `apply` wrote.

    Args:
        path: where it is.
        name: what it is called in a history; by default the file's or folder's name.
        row: makes a row out of columns given by name, such as a dataclass; by default a row is a dict.

    Raises:
        InputError: nothing to read, a damaged manifest, or a source that changed since it was laid out.
    """
    require_extra("partitioning", "pyarrow")
    path = Path(path)
    if not (path / MANIFEST).is_file():
        parquet_files(path)
        return Table(name=name or path.stem, source=path, row=row)
    manifest = read_manifest(path)
    layout = Layout(**manifest["layout"]) if manifest["layout"] is not None else None
    source = Path(manifest["source"])
    if layout is not None and source.exists() and state_of(source) != manifest["source_state"]:
        raise InputError(
            f"{source} changed since {path} was laid out from it; apply the layout again, or roll it back."
        )
    return Table(name=name or manifest["table"], source=source, folder=path, layout=layout, row=row)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a table that was laid out."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {manifest['format']} {manifest['version']}")
        if manifest["layout"] is not None:
            asdict(Layout(**manifest["layout"]))
        [manifest[name] for name in ("table", "source", "source_state", "previous")]
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no layout; make one with apply.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no manifest that this Capstan reads: {error}. Apply the layout again."
        ) from error
    return dict(manifest)


def parquet_files(path: Path) -> list[Path]:
    """The Parquet files at a path."""
    if path.is_file():
        return [path]
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else []
    if not files:
        raise InputError(f"There are no Parquet files at {path}.")
    return files


def state_of(source: Path) -> list[list[Any]]:
    """What tells a changed source: names, sizes and times of its files."""
    told = [(path, path.stat()) for path in parquet_files(source)]
    return [[path.name, each.st_size, each.st_mtime_ns] for path, each in told]


def read_batches(files: list[Path]) -> Iterator["pa.RecordBatch"]:
    """Rows of Parquet files, some thousand at a time.

    Raises:
        InputError: a file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                yield from file.iter_batches(batch_size=_BATCH_ROWS)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} cannot be read as Parquet: {error}.") from error
