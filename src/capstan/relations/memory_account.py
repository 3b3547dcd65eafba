"""How many bytes the engine holds, the most that it ever held, and what it spends its time on."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from time import perf_counter


class MemoryAccount:
    """Counts what is held by whoever says so; several threads may.

    >>> account = MemoryAccount()
    >>> with account.holding(10):
    ...     account.held_bytes
    10
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self.held_bytes = 0
        self.peak_bytes = 0

    def add(self, size_bytes: int) -> None:
        """Hold more, or less where it is negative."""
        with self._lock:
            self.held_bytes += size_bytes
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    @contextmanager
    def holding(self, size_bytes: int) -> Iterator[None]:
        """Hold `size_bytes` inside the block."""
        self.add(size_bytes)
        try:
            yield
        finally:
            self.add(-size_bytes)


class WorkMeter:
    """Bytes and seconds of reading, computing and writing, summed over threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.size_bytes = {"read": 0, "written": 0}
        self.busy_s = {"read": 0.0, "computed": 0.0, "written": 0.0}

    @contextmanager
    def timing(self, what: str, size_bytes: int = 0) -> Iterator[None]:
        """Time the block as `read`, `computed` or `written`, with the bytes that it moves."""
        started = perf_counter()
        yield
        seconds = perf_counter() - started
        with self._lock:
            self.busy_s[what] += seconds
            if what in self.size_bytes:
                self.size_bytes[what] += size_bytes
