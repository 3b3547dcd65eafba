"""What a scenario is, and the folder that its original files lie in."""

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capstan.errors import InputError, MissingExtra, require_extra
from capstan.evaluation.instances import Instance
from capstan.evaluation.specs import RunSpec

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


@dataclass(frozen=True, kw_only=True)
class DataFolder:
    """`<data-root>/<scenario>/`, where the original files lie under their original names.

    Files may also be compressed (`.gz`, `.zst`). Where a file is not there and `hub` names a data set that
    has it, that is asked if `uses_hub`.
    """

    folder: Path
    page: str = ""
    hub: str = ""
    uses_hub: bool = False

    def path(self, name: str, looks_like: str = "") -> Path:
        """Where a file is.

        Raises:
            InputError: it is not there; says its name, where it is published, and how it begins.
        """
        for candidate in (name, f"{name}.gz", f"{name}.zst"):
            if (self.folder / candidate).exists():
                return self.folder / candidate
        if self.hub and self.uses_hub:
            return self._from_hub(name)
        raise InputError(
            f"There is no {self.folder / name}. "
            + (f"It is published at {self.page}. " if self.page else "")
            + (f"It holds {looks_like}. " if looks_like else "")
            + "Put it there under that name, or name another folder with --data-root."
        )

    def _from_hub(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        repository, _, inside = self.hub.partition(":")
        try:
            return Path(hf_hub_download(repository, f"{inside}{name}", repo_type="dataset"))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise InputError(
                f"There is no {self.folder / name}, and the data set {repository} of the Hugging Face "
                f"hub could not "
                f"be asked for it ({type(error).__name__}). Put the file there."
            ) from error

    def exists(self, name: str) -> bool:
        """Whether a file is there, compressed or not."""
        return any((self.folder / each).exists() for each in (name, f"{name}.gz", f"{name}.zst"))

    def text(self, name: str, looks_like: str = "") -> str:
        """A whole file."""
        with self._opened(name, looks_like) as stream:
            return str(stream.read())

    def lines(self, name: str, looks_like: str = "") -> Iterator[str]:
        """A file line by line, line breaks included, never the whole of it in memory."""
        with self._opened(name, looks_like) as stream:
            yield from stream

    def jsonl(self, name: str, looks_like: str = "") -> Iterator[dict[str, Any]]:
        """The objects of a file with one on each line.

        Raises:
            InputError: a line that is none; says which.
        """
        for number, line in enumerate(self.lines(name, looks_like), start=1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except ValueError as error:
                raise InputError(f"{self.folder / name}, line {number}: no JSON ({error}).") from error
            if not isinstance(found, dict):
                raise InputError(f"{self.folder / name}, line {number}: wants an object, not {line[:40]!r}.")
            yield found

    def json(self, name: str, looks_like: str = "") -> Any:
        """A file of JSON."""
        try:
            return json.loads(self.text(name, looks_like))
        except ValueError as error:
            raise InputError(f"{self.folder / name} is no JSON: {error}.") from error

    def rows(self, name: str, looks_like: str = "", *, delimiter: str = ",") -> Iterator[list[str]]:
        """The rows of a CSV file, its header among them."""
        with self._opened(name, looks_like, newline="") as stream:
            yield from csv.reader(stream, delimiter=delimiter)

    def records(self, name: str, looks_like: str = "", *, delimiter: str = ",") -> Iterator[dict[str, str]]:
        """The rows of a CSV file by the names in its header."""
        with self._opened(name, looks_like, newline="") as stream:
            yield from csv.DictReader(stream, delimiter=delimiter)

    def parquet(self, name: str, looks_like: str = "") -> list[dict[str, Any]]:
        """The rows of a Parquet file."""
        require_extra("evaluation-parquet", "pyarrow")
        from pyarrow import ArrowException, parquet

        path = self.path(name, looks_like)
        try:
            return list(parquet.read_table(path).to_pylist())
        except (ArrowException, OSError) as error:
            raise InputError(f"{path} is no Parquet file that can be read: {error}.") from error

    def names(self, under: str, looks_like: str = "") -> list[str]:
        """The names in a folder, in order of numbers and letters."""
        path = self.path(under, looks_like)
        return sorted((each.name for each in path.iterdir()), key=lambda name: (len(name), name))

    @contextmanager
    def _opened(self, name: str, looks_like: str, newline: str | None = None) -> Iterator[io.TextIOBase]:
        """A file's text, a mark of its byte order left out; what is wrong with it is an InputError."""
        path = self.path(name, looks_like)
        try:
            with _text_stream(path, newline) as stream:
                yield stream
        except IsADirectoryError as error:
            raise InputError(f"{path} is a folder; a file of that name is wanted.") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 ({error}). Convert it, as with iconv -t utf-8.") from error
        except csv.Error as error:
            raise InputError(f"{path} is no CSV that can be read: {error}.") from error
        except (OSError, EOFError) as error:
            raise InputError(f"{path} cannot be read: {error}.") from error


def _text_stream(path: Path, newline: str | None) -> io.TextIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    if path.suffix == ".zst":
        return _zstandard(path)
    return path.open(encoding="utf-8-sig", newline=newline)


def _zstandard(path: Path) -> io.TextIOBase:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{path} is compressed with Zstandard. Decompress it (zstd -d), or: pip install zstandard"
        ) from error
    return io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(path.open("rb")), encoding="utf-8-sig")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A source of instances, and how HELM asks them.

    Args:
        name: the first word of its run entries.
        folder: where its files lie under the data root; empty for generators.
        class_name: HELM's name of it.
        load: `load(data, **args)` gives its instances, in HELM's order.
        run_spec: `run_spec(**args)` gives the run that a run entry names.
        main_metric, main_split: what its leaderboard shows.
        shown_metrics: what is shown beside the main metric; the first of them that a run has stands for a
            main metric that it has not.
        page: where its files are published.
        hub: a data set of the Hugging Face hub that has the same files, as `repository:folder/`.
    """

    name: str
    folder: str
    class_name: str
    description: str
    load: Callable[..., list[Instance]]
    run_spec: Callable[..., RunSpec]
    main_metric: str
    main_split: str = "test"
    shown_metrics: tuple[str, ...] = ()
    page: str = ""
    hub: str = ""

    def data(self, root: Path | None, *, uses_hub: bool = False) -> DataFolder:
        """Its folder under a data root."""
        base = (root or Path("data")) / self.folder
        return DataFolder(folder=base, page=self.page, hub=self.hub, uses_hub=uses_hub)


def passage_and_question(passage: str, question: str, *, separator: str = "\n", prefix: str = "") -> str:
    """A text with a question after it, as HELM writes them."""
    return f"{prefix}{passage}{separator}Question: {question}"


def required(row: Mapping[str, Any], *names: str, where: str) -> list[Any]:
    """Fields of a row.

    Raises:
        InputError: one is missing; says which, where, and which there are.
    """
    missing = [name for name in names if name not in row]
    if missing:
        raise InputError(
            f"{where} lacks {', '.join(missing)}; it has {', '.join(map(str, row)) or 'nothing'}."
        )
    return [row[name] for name in names]
