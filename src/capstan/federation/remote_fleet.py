"""Devices in other processes: they join, ask what to do, and say what came of it. NumPy only.

The driver's thread gives tasks and waits; threads of sessions take them to devices. A task is over when its
result is there, when its device has gone, or when its time is: what comes later is dropped and counted.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Condition
from typing import Any, TypeVar

from capstan.errors import InputError, TimeoutExpired, UsageError
from capstan.federation.messages import (
    GivenTask,
    Said,
    kind_of,
    read_json,
    read_result,
    write_json,
    write_task,
)
from capstan.federation.tasks import DeviceFacts, Result, Task
from capstan.transport.sessions import Peer

T = TypeVar("T")
_POLL_S = 2.0  # after which a device that has nothing to do is told so, and asks again


@dataclass(eq=False)
class _Member:
    """A device as the server sees it."""

    session: str | None = None
    facts: DeviceFacts | None = None
    is_connected: bool = False
    is_restarted: bool = False
    task: GivenTask | None = None
    is_taken: bool = False


class RemoteFleet:
    """`count` devices behind a `SessionServer`, whose `handle` and `on_lost` are this fleet's.

    Args:
        job: what a device is told when it joins, for JSON.
        deadline_s: how long devices may take for a task.
        rejoin_s: how long the driver waits for as many devices as it needs.
    """

    def __init__(self, count: int, job: dict[str, Any], *, deadline_s: float, rejoin_s: float) -> None:
        self._members = [_Member() for _ in range(count)]
        self._job, self._deadline_s, self._rejoin_s = job, deadline_s, rejoin_s
        self._changed = Condition()
        self._given = 0
        self._end: bytes | None = None  # what devices are told once it is over
        self._read: Callable[[int, Result], Any] = lambda number, result: result
        self._results: dict[int, Any] = {}
        self._facts: list[DeviceFacts] = []
        self.late_results = 0
        """Results that came when their task was over."""

    # --- the driver's thread -------------------------------------------------------------------------

    @property
    def facts(self) -> Sequence[DeviceFacts]:
        """Of each device, once all have joined."""
        return self._facts

    def wait_for_all(self, batches: Callable[[Sequence[int]], Sequence[int]]) -> None:
        """Wait until every device has joined; `batches` gives their batch sizes from their samples.

        Raises:
            TimeoutExpired: one has not, within `rejoin_s`.
        """
        numbers = range(len(self._members))
        self.present(numbers, len(numbers))
        found = [member.facts for member in self._members if member.facts is not None]
        sizes = batches([each.num_samples for each in found])
        self._facts = [each._replace(batch_size=size) for each, size in zip(found, sizes, strict=True)]

    def present(self, numbers: Sequence[int], least: int) -> set[int]:
        """See `Fleet`.

        Raises:
            TimeoutExpired: fewer than `least` are there for `rejoin_s`.
        """
        until_s = time.monotonic() + self._rejoin_s
        with self._changed:
            while True:
                there = {number for number in numbers if self._members[number].is_connected}
                left_s = until_s - time.monotonic()
                if len(there) >= least:
                    return there
                if left_s <= 0:
                    missing = ", ".join(str(each) for each in numbers if each not in there)
                    raise TimeoutExpired(
                        f"Wanted {least} devices, found {len(there)} after {self._rejoin_s:g} s. Not there: "
                        f"{missing}. Start them, or ask for a lower quorum or a longer rejoin_s."
                    )
                self._changed.wait(left_s)

    def take_restarted(self) -> set[int]:
        """See `Fleet`."""
        with self._changed:
            restarted = {number for number, each in enumerate(self._members) if each.is_restarted}
            for number in restarted:
                self._members[number].is_restarted = False
        return restarted

    def run(self, tasks: Mapping[int, Task], read: Callable[[int, Result], T]) -> dict[int, T]:
        """See `Fleet`; `read` is called in the threads of sessions, once a device."""
        until_s = time.monotonic() + self._deadline_s
        with self._changed:
            self._read, self._results = read, {}
            for number, task in tasks.items():
                member = self._members[number]
                if member.is_connected:
                    self._given += 1
                    member.task, member.is_taken = GivenTask(self._given, task), False
            self._changed.notify_all()
            while any(self._is_awaited(number) for number in tasks):
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
            for number in tasks:
                self._members[number].task = None
            return {number: self._results[number] for number in tasks if number in self._results}

    def end(self, failure: str = "", timeout_s: float = 10.0) -> None:
        """Tell all devices that it is over, or what failed, as far as they ask within `timeout_s`."""
        until_s = time.monotonic() + timeout_s
        with self._changed:
            self._end = bytes([Said.END]) + failure.encode()
            self._changed.notify_all()
            while any(member.is_connected for member in self._members):
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    return
                self._changed.wait(left_s)

    def _is_awaited(self, number: int) -> bool:
        member = self._members[number]
        return member.task is not None and member.is_connected

    # --- the threads of sessions ---------------------------------------------------------------------

    def handle(self, peer: Peer, message: bytes) -> bytes:
        """Answer one message of a device.

        Raises:
            InputError: it is not what a device says, or this session is not its device's any more.
        """
        said = kind_of(message)
        if said is Said.HELLO:
            return self._join(peer, read_json(message).get("device"))
        number, member = self._member_of(peer)
        if said is Said.FACTS:
            self._note_facts(number, member, read_json(message))
        elif said is Said.RESULT:
            self._take(number, member, message)
        elif said is not Said.READY:
            raise InputError(f"Devices do not say {said.name}.")
        return self._next(peer, number, member)

    def on_lost(self, peer: Peer) -> None:
        """A device's connection has gone."""
        with self._changed:
            for member in self._members:
                if member.session == peer.session:
                    member.is_connected = False
            self._changed.notify_all()

    def _join(self, peer: Peer, number: Any) -> bytes:
        if type(number) is not int or not 0 <= number < len(self._members):
            raise UsageError(f"Devices are numbered from 0 to {len(self._members) - 1}, found {number!r}.")
        with self._changed:
            member = self._members[number]
            # Whoever comes last is the device: the one before may have died without a word.
            member.session, member.is_connected, member.task = peer.session, False, None
            self._changed.notify_all()
        return write_json(Said.JOB, self._job)

    def _member_of(self, peer: Peer) -> tuple[int, _Member]:
        with self._changed:
            for number, member in enumerate(self._members):
                if member.session == peer.session:
                    return number, member
        raise InputError(f"{peer} is no device of this job, or another one has joined as it: join again.")

    def _note_facts(self, number: int, member: _Member, record: dict[str, Any]) -> None:
        facts = _read_facts(record)
        with self._changed:
            if member.facts is not None and member.facts != facts:
                raise InputError(
                    f"Device {number} had {member.facts.num_samples} samples and activations of the shape "
                    f"{member.facts.cut_shape}, and came back with {facts.num_samples} and {facts.cut_shape}."
                )
            member.facts, member.is_restarted = facts, True

    def _take(self, number: int, member: _Member, message: bytes) -> None:
        given, result = read_result(message)
        with self._changed:
            is_current = member.task is not None and member.task.number == given
            read = self._read
            self.late_results += not is_current
        if not is_current:
            return
        try:
            value = read(number, result)
        except InputError:
            with self._changed:
                member.session, member.is_connected, member.task = None, False, None
                self._changed.notify_all()
            raise
        with self._changed:
            if member.task is not None and member.task.number == given:
                self._results[number], member.task = value, None
                self._changed.notify_all()
            else:
                self.late_results += 1

    def _next(self, peer: Peer, number: int, member: _Member) -> bytes:
        until_s = time.monotonic() + _POLL_S
        with self._changed:
            if member.facts is None:
                raise InputError(f"Device {number} has not said what it has.")
            member.is_connected = member.session == peer.session
            self._changed.notify_all()
            while True:
                if member.session != peer.session:
                    raise InputError(f"Another one has joined as device {number}: this one is left out.")
                if self._end is not None:
                    member.is_connected = False
                    self._changed.notify_all()
                    return self._end
                if member.task is not None and not member.is_taken:
                    member.is_taken = True
                    return write_task(member.task)
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    return bytes([Said.WAIT])
                self._changed.wait(left_s)


def facts_record(facts: DeviceFacts) -> dict[str, Any]:
    """What a device says of itself, for JSON."""
    return {"num_samples": facts.num_samples, "cut_shape": facts.cut_shape, "is_shared": facts.is_shared}


def _read_facts(record: dict[str, Any]) -> DeviceFacts:
    size, shape, is_shared = (record.get(name) for name in ("num_samples", "cut_shape", "is_shared"))
    if (
        type(size) is not int
        or not 0 <= size < 2**32
        or not isinstance(shape, list)
        or not all(type(each) is int and 0 < each < 2**32 for each in shape)
        or math.prod(shape) >= 2**32
        or not isinstance(is_shared, bool)
    ):
        raise InputError(f"Wanted a device's samples, shape of the cut and if it shares; found {record}.")
    return DeviceFacts(size, 1, tuple(shape), is_shared)
