"""Busy time of a resource, measured without stopping a GPU."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

from capstan.transport.ledger import Ledger


class Stopwatch:
    """Books the time of a `with` block to a resource in the ledger.

    On a CPU that is elapsed time. On CUDA it is the time between two events on the device's current stream,
    read when `settle()` is called, so that measuring never waits for the device.
    """

    def __init__(self, ledger: Ledger, device: torch.device) -> None:
        self._ledger = ledger
        self._device = device
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._lock = Lock()

    @contextmanager
    def time(self, resource: str) -> Iterator[None]:
        """Book the block to `resource`."""
        if self._device.type != "cuda":
            start_s = time.perf_counter()
            yield
            self._ledger.spend(resource, time.perf_counter() - start_s)
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(self._device)
        start.record(stream)
        yield
        end.record(stream)
        with self._lock:
            self._pending.append((resource, start, end))

    def settle(self) -> None:
        """Book what the device has measured; waits for the blocks that still run."""
        with self._lock:
            pending, self._pending = self._pending, []
        for resource, start, end in pending:
            end.synchronize()
            self._ledger.spend(resource, start.elapsed_time(end) / 1e3)
