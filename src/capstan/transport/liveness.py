"""Who of a group of ranks is alive, and which loss all of them report.

A closed connection or a wait that expires does not say who is to blame: when one rank stops, those who waited
for it give up and close their connections, and others then see living ranks go. So each rank counts its own
heartbeats in the group's store, on a thread of its own, and says there whom it waits for. After a loss a rank
looks whose heart has stopped, or where the chain of waiting ends, and the first one to find out writes it
down for the others.
"""

import json
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple

BEAT_S = 0.25
# A heart that has not beaten for so long has stopped; a busy machine can hold a thread up for a second.
GRACE_S = 3.0
_POLL_S = 0.05
_LOSS = "loss"


class Loss(NamedTuple):
    """Who was lost, and how it showed: the rank is gone, or it is there and does not answer."""

    kind: Literal["gone", "silent"]
    ranks: list[int]
    reporter: int


class Liveness:
    """One rank's heartbeats, and its look at the others'.

    Args:
        store: the group's own, in which this one is number `rank`.
    """

    def __init__(self, store: Any, rank: int) -> None:
        # Connections of their own: another thread may wait in the store.
        self._store = store.clone()
        self._heart = _Heart(store.clone(), rank)
        thread = threading.Thread(target=self._heart.beat, name="capstan heartbeat", daemon=True)
        thread.start()
        weakref.finalize(self, _stop, self._heart, thread)

    @contextmanager
    def waiting_for(self, rank: int) -> Iterator[None]:
        """While this lasts, this rank waits for another one."""
        thread = threading.get_ident()
        self._heart.waits[thread] = rank
        try:
            yield
        finally:
            del self._heart.waits[thread]

    def stopped(self, among: Iterable[int]) -> list[int]:
        """The ranks whose hearts do not beat. Looks for up to `GRACE_S`.

        Raises:
            RuntimeError: the store cannot be reached.
        """
        waiting = {rank: self._beats(rank) for rank in among}
        until_s = time.monotonic() + GRACE_S
        while waiting and time.monotonic() < until_s:
            time.sleep(_POLL_S)
            waiting = {rank: beats for rank, beats in waiting.items() if self._beats(rank) == beats}
        return sorted(waiting)

    def end_of_chain(self, rank: int) -> int:
        """The rank that keeps the others waiting: the one that `rank` waits for, or that one waits for, …

        Raises:
            RuntimeError: the store cannot be reached.
        """
        seen: list[int] = []
        while rank not in seen:
            seen.append(rank)
            told = self._read(f"{rank} waits for")
            rank = int(told) if told else rank
        return rank

    def agree(self, own: Loss) -> Loss:
        """The loss that the first of all ranks found: this one, unless another rank was earlier.

        Raises:
            RuntimeError: the store cannot be reached.
        """
        return Loss(*json.loads(self._store.compare_set(_LOSS, "", json.dumps(own))))

    def awaited(self) -> Loss | None:
        """The loss that some rank has found, or finds within `GRACE_S`.

        Raises:
            RuntimeError: the store cannot be reached.
        """
        until_s = time.monotonic() + GRACE_S
        while not (told := self._read(_LOSS)) and time.monotonic() < until_s:
            time.sleep(_POLL_S)
        return Loss(*json.loads(told)) if told else None

    def _read(self, key: str) -> bytes:
        return bytes(self._store.get(key)) if self._store.check([key]) else b""

    def _beats(self, rank: int) -> int:
        return int(self._store.add(str(rank), 0))


def _stop(heart: "_Heart", thread: threading.Thread) -> None:
    """Also when the process ends, before Python does: a thread that is then in the store's C++ aborts it
    ("terminate called without an active exception")."""
    heart.stop.set()
    if thread is not threading.current_thread():
        thread.join(BEAT_S)


class _Heart:
    """What the thread holds on to; it ends when the `Liveness` is dropped."""

    def __init__(self, store: Any, rank: int) -> None:
        self.stop = threading.Event()
        self.waits: dict[int, int] = {}  # by thread, the longest wait first
        self._store, self._rank = store, rank

    def beat(self) -> None:
        """Until told to stop, or until the store is gone, and with it those who would look."""
        told: int | None = None
        with suppress(RuntimeError):
            while not self.stop.wait(BEAT_S):
                self._store.add(str(self._rank), 1)
                waits_for = next(iter([*self.waits.values()]), None)
                if waits_for != told:
                    self._store.set(f"{self._rank} waits for", "" if waits_for is None else str(waits_for))
                    told = waits_for
