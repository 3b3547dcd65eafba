"""`record`: keep what the jobs of a block, or of a function, did."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from contextvars import ContextVar, Token
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from capstan.errors import UsageError
from capstan.partitioning.history import History, JobRun

_current: ContextVar["record | _Collecting | None"] = ContextVar("recording", default=None)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class record(ContextDecorator):  # noqa: N801 - used as a word: `with record("runs.db"):`, `@record("runs.db")`
    """Keep the jobs that run inside, in the history at `path`.

        with record("runs.db"):
            for pair in join(orders, lines, key=..., other=...): ...

    A job belongs to the recording in which it was called, and is added when its results are read: one that
    failed, or was not read to its end, is not in the history.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._history: History | None = None
        self._outer: list[Token[record | _Collecting | None]] = []

    def __call__(self, function: _Function) -> _Function:
        if inspect.isgeneratorfunction(function):
            raise UsageError(
                f"{function.__name__} is a generator: it runs after this recording is closed. "
                "Return what the job gives instead of yielding it, or record where it is read."
            )
        return super().__call__(function)

    def __enter__(self) -> Self:
        self._history = self._history or History(self.path, create=True)
        self._outer.append(_current.set(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.reset(self._outer.pop())

    def add(self, run: JobRun) -> None:
        """Add a run of a job that another engine did."""
        if self._history is None:
            raise UsageError("This recording is not open; add runs inside `with record(...)`.")
        self._history.add(run)


class _Collecting:
    """Keeps runs in memory, and passes them on to the recording around it."""

    def __init__(self, outer: "record | _Collecting | None") -> None:
        self.runs: list[JobRun] = []
        self._outer = outer

    def add(self, run: JobRun) -> None:
        self.runs.append(run)
        if self._outer is not None:
            self._outer.add(run)


@contextmanager
def collect() -> Iterator[list[JobRun]]:
    """The runs of the jobs inside, as they are finished."""
    collecting = _Collecting(_current.get())
    token = _current.set(collecting)
    try:
        yield collecting.runs
    finally:
        _current.reset(token)


def recorder() -> Callable[[JobRun], None]:
    """What adds a run to the innermost `record` that is open now; where none is, what does nothing."""
    recording = _current.get()
    return recording.add if recording is not None else lambda run: None
