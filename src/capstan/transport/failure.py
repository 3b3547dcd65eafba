"""What went wrong in the background, until somebody asks."""

from threading import Lock


class FirstFailure:
    """The first error of another thread since the last look; raised once, and never lost between the two."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._error: BaseException | None = None

    def keep(self, error: BaseException) -> None:
        """Keep an error, unless an earlier one still waits to be raised."""
        with self._lock:
            self._error = self._error or error

    def check(self) -> None:
        """Raise what was kept, once."""
        with self._lock:
            error, self._error = self._error, None
        if error is not None:
            raise error
