"""Busy time of a resource, measured without stopping a GPU."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple

import torch

from capstan.transport.ledger import Ledger


class _Lap(NamedTuple):
    """A stretch of work of a resource, between two marks in a CUDA stream."""

    resource: str
    start: torch.cuda.Event
    end: torch.cuda.Event


class Stopwatch:
    """Books the time of stretches of work to resources in the ledger.

    On a CPU that is elapsed time. On CUDA it is the time between two events on the device's current stream,
    read when `settle()` is called, so that measuring never waits for the device.
    """

    def __init__(self, ledger: Ledger, device: torch.device) -> None:
        self._ledger = ledger
        self._device = device
        self._pending: list[_Lap] = []
        self._lock = Lock()

    def start(self, resource: str) -> Callable[[], None]:
        """Begin a stretch of `resource`; call what is returned to end it."""
        if self._device.type != "cuda":
            start_s = time.perf_counter()
            return lambda: self._ledger.spend(resource, time.perf_counter() - start_s)
        lap = _Lap(resource, torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        stream = torch.cuda.current_stream(self._device)
        lap.start.record(stream)

        def stop() -> None:
            lap.end.record(stream)
            with self._lock:
                self._pending.append(lap)

        return stop

    @contextmanager
    def time(self, resource: str) -> Iterator[None]:
        """Book the block to `resource`."""
        stop = self.start(resource)
        yield
        stop()

    def settle(self, *, waits: bool = True) -> None:
        """Book what the device has measured; `waits` for the stretches that still run, or leaves them."""
        with self._lock:
            pending, self._pending = self._pending, []
        for lap in pending:
            if waits:
                lap.end.synchronize()
            elif not lap.end.query():
                with self._lock:
                    self._pending.append(lap)
                continue
            self._ledger.spend(lap.resource, lap.start.elapsed_time(lap.end) / 1e3)


class Clock:
    """Books the time of one resource that works with pauses."""

    def __init__(self, stopwatch: Stopwatch, resource: str) -> None:
        self._stopwatch, self._resource = stopwatch, resource
        self._stop: Callable[[], None] | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Book the block, its pauses apart."""
        self._stop = self._stopwatch.start(self._resource)
        try:
            yield
        finally:
            self._stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside `running`: a wait that is no work."""
        assert self._stop is not None
        self._stop()
        try:
            yield
        finally:
            self._stop = self._stopwatch.start(self._resource)
