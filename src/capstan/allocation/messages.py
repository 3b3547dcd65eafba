"""Messages between devices as works: a link each way, and interfaces that all transfers of a device share."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from capstan.allocation.virtual_time import Work
from capstan.errors import UsageError
from capstan.hardware import Cluster
from capstan.plans import link_name


@dataclass(frozen=True, kw_only=True)
class Interfaces:
    """What all transfers of a device together may send and receive, for each device by number.

    A pair's bandwidth bounds one transfer, an interface all that pass it.
    """

    up_bytes_per_s: Sequence[float]
    down_bytes_per_s: Sequence[float]

    def __post_init__(self) -> None:
        for name in ("up_bytes_per_s", "down_bytes_per_s"):
            if not all(rate > 0 for rate in getattr(self, name)):
                raise UsageError(f"{name} has {min(getattr(self, name))}; give rates above 0, or infinity.")

    def of_devices(self, numbers: Sequence[int]) -> "Interfaces":
        """Those of some devices, in this order."""
        return Interfaces(
            up_bytes_per_s=[self.up_bytes_per_s[number] for number in numbers],
            down_bytes_per_s=[self.down_bytes_per_s[number] for number in numbers],
        )


class Messages:
    """Makes the works of messages, in the order in which each device sends them and receives them.

    A message of n bytes over a link of bandwidth b occupies the link for n / min(b, up, down), the sender's
    interface for n / up from its first byte and the receiver's for n / down from when that arrives. The
    interfaces serve messages in the order in which these methods were called: nothing overtakes, unless the
    interface is unbounded.

    Differs: real interfaces share their rate among all messages at once. Here one that has begun keeps its
    rate, and the next begins as soon as the interface has the room.
    """

    def __init__(self, cluster: Cluster, interfaces: Interfaces | None) -> None:
        self.names = cluster.names
        self._cluster = cluster
        self._interfaces = interfaces
        self._sent: dict[int, tuple[str, float]] = {}
        self._received: dict[int, tuple[str, float]] = {}
        for name in ("up_bytes_per_s", "down_bytes_per_s") if interfaces else ():
            if len(getattr(interfaces, name)) != len(self.names):
                raise UsageError(
                    f"{name} has {len(getattr(interfaces, name))} entries for {len(self.names)} devices."
                )

    def send(
        self,
        source: int,
        target: int,
        size_bytes: float,
        after: tuple[str, ...],
        *,
        name: str,
        resource: str | None = None,
        order: int = 0,
    ) -> Work:
        """A message; `name` has arrived when its work is done, unless `receive` says when."""
        up = self._interfaces.up_bytes_per_s[source] if self._interfaces else math.inf
        sending = self._sending(name)
        return Work(
            name=sending,
            resource=resource or link_name(self.names[source], self.names[target]),
            seconds=size_bytes / self._rate(source, target),
            delay_s=self._cluster.latency_s[source][target],
            after=after,
            order=order,
            behind=_in_turn(self._sent, source, sending, size_bytes, up),
        )

    def receive(self, source: int, target: int, size_bytes: float, name: str) -> Iterator[Work]:
        """The arrival of what `send` sends under that name, where interfaces bound it."""
        if self._interfaces is None:
            return
        down = self._interfaces.down_bytes_per_s[target]
        first_byte = (self._sending(name), self._cluster.latency_s[source][target])
        yield Work(
            name=name,
            resource=f"{link_name(self.names[source], self.names[target])} arrives",
            seconds=size_bytes / self._rate(source, target),
            behind=(first_byte, *_in_turn(self._received, target, name, size_bytes, down)),
        )

    def _sending(self, name: str) -> str:
        return f"{name}, sent" if self._interfaces else name

    def _rate(self, source: int, target: int) -> float:
        rate = self._cluster.bandwidth_bytes_per_s[source][target]
        if self._interfaces is None:
            return rate
        return min(rate, self._interfaces.up_bytes_per_s[source], self._interfaces.down_bytes_per_s[target])


def _in_turn(
    last: dict[int, tuple[str, float]], device: int, name: str, size_bytes: float, rate: float
) -> tuple[tuple[str, float], ...]:
    """How far a message stays behind the one before it on an interface, on which it is now the last."""
    if rate == math.inf:
        return ()
    before = (last[device],) if device in last else ()
    last[device] = (name, size_bytes / rate)
    return before
