"""Lanes: ordered background workers, one for each direction in which bytes move.

A task handed to a lane runs after all earlier tasks of that lane. On CUDA the lane has a stream of its
own; order between streams is kept by events, never by stopping the device. A lane copies in one direction
only: where one copied in both, its small copies were seen to wait for all large ones of another lane.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Self

import torch

from capstan.errors import TimeoutExpired
from capstan.transport.failure import FirstFailure
from capstan.transport.ledger import Ledger
from capstan.transport.stopwatch import Stopwatch

_PATIENCE_S = 600.0

# By default CUDA gives all streams 8 queues between them, and a copy waits for whatever is before it in its
# queue, on the other link too. Read when CUDA wakes up; whoever has set it knows why.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


@cache
def stream_of(device: torch.device, name: str) -> torch.cuda.Stream | None:
    """The device's stream of this name; None where there are no streams.

    There is one for each name, however many jobs come and go: torch has 32, and then hands them out again,
    so that two lanes which were meant to run side by side would share one.
    """
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)


class Ticket:
    """A promise that a task's effect will be visible; `wait()` before using what it wrote."""

    def __init__(self, lane: str, future: "Future[torch.cuda.Event | None]") -> None:
        self._lane = lane
        self._future = future

    @property
    def is_done(self) -> bool:
        """Whether the task's effect is there already."""
        if not self._future.done():
            return False
        event = self._issued()
        return event is None or event.query()

    def _issued(self) -> torch.cuda.Event | None:
        try:
            return self._future.result(timeout=_PATIENCE_S)
        except TimeoutError:
            if self._future.done():  # the task's own error, not this wait's
                raise
            raise TimeoutExpired(
                f"The lane {self._lane!r} did not finish a copy within {_PATIENCE_S:.0f} s: "
                "is the disk or the device still alive?"
            ) from None

    def wait(self) -> None:
        """Order the current stream of the lane's device (or, without CUDA, this thread) after the task;
        raise its error."""
        event = self._issued()
        if event is not None:
            event.wait(torch.cuda.current_stream(event.device))

    def wait_on(self, stream: torch.cuda.Stream) -> None:
        """Order `stream`, which may be another device's, after the task; raise the task's error."""
        event = self._issued()
        if event is not None:
            event.wait(stream)

    def wait_on_host(self) -> None:
        """Block this thread until the task's effect is in host memory or on disk."""
        event = self._issued()
        if event is not None:
            event.synchronize()


class Lane:
    """An ordered worker. Use as a context manager, or `close()` it."""

    def __init__(self, name: str, *, device: torch.device, ledger: Ledger) -> None:
        self.name = name
        self.ledger = ledger
        self._stream = stream_of(device, name)
        # With its index, since "cuda" alone means another device whenever a thread changes its current one.
        self._device = device if self._stream is None else self._stream.device
        self.stopwatch = Stopwatch(ledger, self._device)
        self._last: Ticket | None = None
        self._failure = FirstFailure()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"capstan {name}")

    def submit(
        self,
        task: Callable[[], None],
        *,
        after: Sequence[Ticket] = (),
        uses: Sequence[torch.Tensor] = (),
    ) -> Ticket:
        """Run `task` after everything submitted here before, after `after`, and after the work that the
        calling thread's current stream of the lane's device has been given so far.

        `uses` names device tensors that the task reads and that the caller may drop before it has run.
        """
        self.check()
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
            for tensor in uses:
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)
        self._last = Ticket(self.name, self._worker.submit(self._watched, task, tuple(after), ready))
        return self._last

    def check(self) -> None:
        """Raise what an earlier task raised, once, also if nobody waits for that task."""
        self._failure.check()

    def drain(self) -> None:
        """Wait until everything submitted so far has taken effect; raise, once, the first error among it."""
        last, self._last = self._last, None
        try:
            if last is not None:
                last.wait_on_host()
        finally:
            self.check()

    def _watched(
        self, task: Callable[[], None], after: tuple[Ticket, ...], ready: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        try:
            return self._run(task, after, ready)
        except BaseException as error:
            self._failure.keep(error)
            raise

    def _run(
        self, task: Callable[[], None], after: tuple[Ticket, ...], ready: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        if self._stream is None:
            with torch.inference_mode():
                for ticket in after:
                    ticket.wait()
                task()
            return None
        with torch.inference_mode(), torch.cuda.stream(self._stream):  # the lane's device is current, too
            for ticket in after:
                ticket.wait_on(self._stream)
            if ready is not None:
                ready.wait()
            task()
            done = torch.cuda.Event()
            done.record()
        return done

    def copy(self, target: torch.Tensor, source: torch.Tensor, *, link: str, content: str) -> None:
        """Inside a task: copy `source` to `target`, which may be on another device, and book it."""
        with self.stopwatch.time(link):
            target.copy_(source, non_blocking=True)
        self.ledger.count(link, content, source.numel() * source.element_size())

    @contextmanager
    def booking(self, link: str, content: str, size_bytes: int) -> Iterator[None]:
        """Inside a task: book a block that moves `size_bytes` between host memory and disk."""
        start_s = time.perf_counter()
        yield
        self.ledger.spend(link, time.perf_counter() - start_s)
        self.ledger.count(link, content, size_bytes)

    def fence(self) -> torch.cuda.Event | None:
        """Inside a task: a mark after the copies started so far; None where copies are done when started."""
        if self._stream is None:
            return None
        mark = torch.cuda.Event()
        mark.record()
        return mark

    def synchronize(self) -> None:
        """Inside a task: wait on the host until the copies that it has started are done."""
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """Let running tasks end, drop the ones that have not begun."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
