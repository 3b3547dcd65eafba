"""A thread that does what it is given, in that order, while the caller goes on."""

import threading
from collections import deque
from collections.abc import Callable

from capstan.errors import TimeoutExpired


class UpdateWorker:
    """One thread and a queue of at most `most` tasks, the running one included.

    An error in a task stops all later ones and is raised at the caller's next call.
    """

    def __init__(self, most: int, *, patience_s: float) -> None:
        self.most, self.patience_s = most, patience_s
        self._tasks: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    def submit(self, task: Callable[[], None]) -> None:
        """Queue a task; waits while the queue is full."""
        with self._changed:
            self._wait(lambda: len(self._tasks) < self.most)
            self._tasks.append(task)
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="capstan-updates", daemon=True)
            self._thread.start()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; it is looked at whenever a task is done.

        Raises:
            TimeoutExpired: it does not within `patience_s`.
        """
        with self._changed:
            self._wait(condition)

    def drain(self) -> None:
        """Wait until everything queued is done."""
        self.wait_for(lambda: not self._tasks)

    def close(self) -> None:
        """Do what is queued and end the thread; an error that nobody has seen is raised."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(self.patience_s)
            if self._thread.is_alive():
                raise TimeoutExpired(f"Background updates did not end within {self.patience_s:g} s.")
            self._thread = None
        self._closing = False
        self._raise()

    def _wait(self, condition: Callable[[], bool]) -> None:
        done = self._changed.wait_for(lambda: self._error is not None or condition(), self.patience_s)
        self._raise()
        if not done:
            raise TimeoutExpired(
                f"{len(self._tasks)} background updates are not done after {self.patience_s:g} s. "
                "Raise patience_s if a step may take so long."
            )

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._closing)
                if not self._tasks:
                    return
                task = self._tasks[0]
            try:
                task()
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._tasks.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                self._tasks.popleft()
                self._changed.notify_all()
