"""The crew: a thread in which the engine runs one open job, and the asks that wait for its answers.

All methods but those of the thread itself are for the event loop's thread.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from threading import Thread
from typing import Any

from capstan.generation.engine import Engine
from capstan.generation.requests import Completion, Request
from capstan.generation.runtime.arrivals import Arrivals
from capstan.generation.runtime.measured import Progress
from capstan.generation.runtime.sequences import Sequence as Growing
from capstan.generation.runtime.sequences import completion_of

logger = logging.getLogger(__name__)


class Overloaded(Exception):
    """As many wait as may; `retry_after_s` is about when there will be room."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"The queue is full; about {retry_after_s} s until there is room.")
        self.retry_after_s = retry_after_s


class CrewGone(Exception):
    """The engine has stopped or failed; says why."""


@dataclass(eq=False)
class Ask:
    """Requests that are answered together: their sequences, request by request."""

    requests: list[list[Growing]]
    in_a_hurry: bool
    done: "asyncio.Future[None]"
    grown: asyncio.Event | None = None  # set after every sweep, for those who follow along
    num_left: int = 0

    @property
    def sequences(self) -> list[Growing]:
        return [growing for request in self.requests for growing in request]

    def completions(self) -> list[Completion]:
        """One for each request, when all is done."""
        return [completion_of(request) for request in self.requests]


@dataclass
class Counts:
    """What has happened so far."""

    asks: int = 0
    refused: int = 0
    finished: int = 0
    dropped: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    sweeps: int = 0
    running: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=64))  # when sequences ended


class Crew:
    """Runs an engine's open job for many asks.

    Args:
        queue: how many sequences in a hurry may wait beside those that fill the slots.

    `on_failure` is called when the engine failed without having answered anything since it last failed.
    """

    on_failure: Callable[[], None] | None = None

    def __init__(self, engine: Engine, *, queue: int) -> None:
        self.engine, self.slots = engine, engine.block.num_slots
        self.counts = Counts()
        self.failure: str | None = None
        self.has_failed = False
        self._queue = queue
        self._arrivals = Arrivals()
        self._asks: dict[int, Ask] = {}  # by the identity of each of its sequences
        self._followers: set[Ask] = set()
        self._num_in_a_hurry = 0
        self._thread = Thread(target=self._run, name="capstan engine", daemon=True)

    # --- the event loop's side ---------------------------------------------------------------------------

    def start(self) -> None:
        """Let the engine run; called once, in the event loop that will ask."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Sequences that have no slot yet."""
        return max(0, len(self._asks) - self.counts.running)

    @contextmanager
    def asking(
        self, requests: Sequence[Request], *, in_a_hurry: bool = True, follows: bool = False
    ) -> Iterator[Ask]:
        """Ask, and give up the slots when the block is left before all is done.

        Raises:
            Overloaded: too many wait already.
            CrewGone: the engine has stopped.
            InputError: a prompt that cannot be answered.
        """
        ask = self.ask(requests, in_a_hurry=in_a_hurry, follows=follows)
        try:
            yield ask
        finally:
            self.drop(ask)

    def ask(self, requests: Sequence[Request], *, in_a_hurry: bool = True, follows: bool = False) -> Ask:
        """Let requests wait for slots; `follows` if what has grown is wanted after every sweep."""
        if self.failure is not None:
            raise CrewGone(self.failure)
        wanted = sum(request.n for request in requests)
        if in_a_hurry and self._num_in_a_hurry + wanted > self.slots + self._queue:
            self.counts.refused += 1
            raise Overloaded(self._retry_after_s(wanted))
        ask = Ask(
            [self.engine.sequences(request) for request in requests],
            in_a_hurry,
            self._loop.create_future(),
            grown=asyncio.Event() if follows else None,
            num_left=wanted,
        )
        self._asks |= {id(growing): ask for growing in ask.sequences}
        self._num_in_a_hurry += wanted if in_a_hurry else 0
        self.counts.asks += 1
        if follows:
            self._followers.add(ask)
        self._arrivals.put(ask.sequences, in_a_hurry=in_a_hurry)
        return ask

    def drop(self, ask: Ask) -> None:
        """Nobody waits for this any more: what has not ended leaves its slot before the next sweep."""
        self._followers.discard(ask)
        for growing in ask.sequences:
            if self._asks.pop(id(growing), None) is not None:
                growing.is_wanted = False
                self.counts.dropped += 1
                self._num_in_a_hurry -= ask.in_a_hurry
        if not ask.done.done():
            ask.done.cancel()

    def _retry_after_s(self, wanted: int) -> int:
        """How long the queue takes to make room, at the pace at which sequences ended lately."""
        recent = self.counts.recent
        if len(recent) < 2:
            return 1
        pace = len(recent) / max(1e-3, time.monotonic() - recent[0])
        return min(120, max(1, ceil(wanted / pace)))

    async def close(self, *, within_s: float) -> bool:
        """Stop after the sweep that runs; returns whether it ended within so many seconds."""
        self.failure = self.failure or "The server is being stopped."
        self._fail_all(self.failure)
        self._arrivals.close()
        await asyncio.to_thread(self._thread.join, within_s)
        return not self._thread.is_alive()

    def _failed(self, reason: str, is_hopeless: bool) -> None:
        if is_hopeless:
            self.failure, self.has_failed = reason, True
        self._fail_all(reason)
        if is_hopeless and self.on_failure is not None:
            self.on_failure()

    def _fail_all(self, reason: str) -> None:
        for ask in set(self._asks.values()):
            if not ask.done.done():
                ask.done.set_exception(CrewGone(reason))
                ask.done.exception()  # whoever still waits will see it; nobody else need be told
            if ask.grown is not None:
                ask.grown.set()
            self.drop(ask)

    def _over(self, growing: Growing) -> None:
        ask = self._asks.pop(id(growing), None)
        if ask is None:
            return  # dropped meanwhile
        self._num_in_a_hurry -= ask.in_a_hurry
        counts = self.counts
        counts.finished += 1
        counts.prompt_tokens += len(growing.prompt)
        counts.new_tokens += len(growing.generated)
        counts.recent.append(time.monotonic())
        ask.num_left -= 1
        if not ask.num_left:
            self._followers.discard(ask)
            if not ask.done.done():
                ask.done.set_result(None)
        if ask.grown is not None:
            ask.grown.set()

    def _swept(self, progress: Progress) -> None:
        self.counts.sweeps += 1
        self.counts.running = progress.num_running
        for ask in self._followers:
            assert ask.grown is not None
            ask.grown.set()

    # --- the engine's side -------------------------------------------------------------------------------

    def _run(self) -> None:
        num_finished = -1
        while not self._arrivals.is_closed:
            try:
                for growing in self.engine.answer(self._arrivals, on_progress=self._note):
                    self._tell(self._over, growing)
            except Exception as error:
                logger.exception("the engine failed")
                is_hopeless = num_finished == self.counts.finished
                num_finished = self.counts.finished
                self._tell(self._failed, f"The engine failed: {error}", is_hopeless)
                if is_hopeless:
                    return

    def _note(self, progress: Progress) -> None:
        self._tell(self._swept, progress)

    def _tell(self, call: Callable[..., Any], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop is closed: nobody waits any more
            self._arrivals.close()
