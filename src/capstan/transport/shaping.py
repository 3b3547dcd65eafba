"""A shaped link: messages that arrive when they would over a slower network.

Our own messages only, and a model rather than packets: each rank sends and receives at most at a rate,
and what was sent arrives one latency later. For tests and benchmarks where no network can be emulated
(`transport.emulation`); figures taken over it are labelled as such. All ranks must share a machine's clock.
"""

import time
from dataclasses import dataclass
from threading import Lock

from capstan.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the link of every rank is like, in each direction."""

    bandwidth_bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        if not (self.bandwidth_bytes_per_s > 0 and self.latency_s >= 0):
            raise UsageError(
                f"Wanted a bandwidth above 0 and a latency of at least 0, found {self.bandwidth_bytes_per_s} "
                f"bytes/s and {self.latency_s} s."
            )


class ShapedLink:
    """When one rank's messages leave and arrive."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._sent_until_ns = 0
        self._received_until_ns = 0
        self._lock = Lock()

    def due_ns(self, size_bytes: int) -> int:
        """When a message that is sent now reaches the other end's link."""
        start_ns = max(time.monotonic_ns(), self._sent_until_ns)
        self._sent_until_ns = start_ns + self._duration_ns(size_bytes)
        return self._sent_until_ns + round(1e9 * self._shape.latency_s)

    def await_arrival(self, due_ns: int, size_bytes: int) -> None:
        """Sleep until a message that is due has come in, after those that came in before."""
        duration_ns = self._duration_ns(size_bytes)
        with self._lock:
            self._received_until_ns = max(due_ns, self._received_until_ns + duration_ns)
            left_ns = self._received_until_ns - time.monotonic_ns()
        if left_ns > 0:
            time.sleep(left_ns / 1e9)

    def _duration_ns(self, size_bytes: int) -> int:
        return round(1e9 * size_bytes / self._shape.bandwidth_bytes_per_s)
