"""How many bytes the engine holds now, and the most that it ever held."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


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
