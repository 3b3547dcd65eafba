"""One ordered communication thread for a group of ranks.

Operations are begun in the order in which they were submitted, which must be the same on every rank. Up to
`window` of them are under way together, each going on when what it waits for is there. Nothing ever
communicates from another thread or from a callback.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple, Self

import torch

from capstan.errors import CapstanError, TimeoutExpired, UsageError
from capstan.transport.conversation import Conversation, Exchange, Operation
from capstan.transport.group import Group
from capstan.transport.ledger import Ledger
from capstan.transport.shaping import Shape, ShapedLink

WINDOW = 8


class Pending:
    """An operation that was submitted; `wait` before using what it writes."""

    def __init__(self, communicator: "Communicator", about: str) -> None:
        self.about = about
        self.future: Future[torch.cuda.Event | None] = Future()
        self._communicator = communicator

    def wait(self) -> None:
        """Block until the operation is done (on CUDA: order the current stream after it); raise its error.

        Raises:
            DeviceError: a rank is gone.
            TimeoutExpired: a rank was silent, or the communication thread made no progress, for the group's
                patience.
        """
        event = self._communicator.result_of(self)
        if event is not None:
            event.wait(torch.cuda.current_stream())

    def when_done(self, callback: Callable[[BaseException | None], None]) -> None:
        """Call back, from the communication thread, with the error if there was one. Do not communicate
        there.
        """
        self.future.add_done_callback(lambda future: callback(future.exception()))


class _Task(NamedTuple):
    begin: Callable[[Conversation], Operation]
    pending: Pending
    sequence: int
    ready: torch.cuda.Event | None


class _Running(NamedTuple):
    operation: Operation
    exchange: Exchange
    pending: Pending


class _Finished(NamedTuple):
    running: _Running
    error: Exception | None


class Communicator:
    """The communication thread. Use as a context manager, or `close()` it.

    Args:
        group: the ranks; its patience bounds every wait.
        ledger: where bytes are booked; one of its own if none is given.
        window: how many operations may be under way together; 1 through NCCL, which knows no message numbers.
        shape: a slower link to pretend.
        device: the accelerator whose tensors pass, if any.
    """

    def __init__(
        self,
        group: Group,
        *,
        ledger: Ledger | None = None,
        window: int = WINDOW,
        shape: Shape | None = None,
        device: torch.device | None = None,
    ) -> None:
        if window < 1:
            raise UsageError(f"At least one operation must be under way, found a window of {window}.")
        self.group, self.ledger = group, ledger or Ledger()
        self._link = ShapedLink(shape) if shape else None
        self._window = 1 if group.wire_device_type == "cuda" else window
        self._device = device if device is not None and device.type == "cuda" else None
        self._stream = torch.cuda.Stream(self._device) if self._device else None
        self._events: SimpleQueue[_Task | _Finished | None] = SimpleQueue()
        self._waits: SimpleQueue[_Running | None] = SimpleQueue()
        self._active: set[Pending] = set()
        self._submitted = self._progress = 0
        self._failure: BaseException | None = None
        self._num_waiters = 0 if group.wire_device_type == "cuda" else window
        self._thread = Thread(target=self._run, name="capstan communication", daemon=True)
        self._thread.start()
        for at in range(self._num_waiters):
            Thread(target=self._wait_in_turn, name=f"capstan wait {at}", daemon=True).start()

    def submit(self, begin: Callable[[Conversation], Operation], *, about: str) -> Pending:
        """Run an operation after those submitted before; every rank must submit the same ones in one order.

        It runs after what the calling thread's current CUDA stream has been given so far.
        """
        self.check()
        if not self._thread.is_alive():
            raise UsageError(f"The communicator is closed: {about} cannot be sent.")
        ready = None
        if self._device is not None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
        pending = Pending(self, about)
        self._events.put(_Task(begin, pending, self._submitted, ready))
        self._submitted += 1
        return pending

    def check(self) -> None:
        """Raise what broke communication, if something did."""
        if self._failure is not None:
            raise self._failure

    def result_of(self, pending: Pending) -> torch.cuda.Event | None:
        """What an operation ended with; waits as long as something moves."""
        while True:
            progress = self._progress
            try:
                return pending.future.result(timeout=self.group.longest_wait_s)
            except TimeoutError:
                if pending.future.done():
                    raise
                if progress == self._progress:
                    raise TimeoutExpired(
                        f"Rank {self.group.rank} waited {self.group.longest_wait_s:.0f} s for "
                        f"{pending.about} and nothing moved. See what the other ranks printed last."
                    ) from None

    def close(self) -> None:
        """Let what was submitted end, and the thread with it."""
        self._events.put(None)
        self._thread.join(timeout=self.group.longest_wait_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- in the thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        backlog: deque[_Task] = deque()
        is_open = True
        with torch.no_grad(), self._on_stream():
            while is_open or self._active or backlog:
                event = self._events.get()
                if event is None:
                    is_open = False
                elif isinstance(event, _Task):
                    backlog.append(event)
                else:
                    self._go_on(event)
                while backlog and len(self._active) < self._window:
                    self._begin(backlog.popleft())
        for _ in range(self._num_waiters):
            self._waits.put(None)
        self._refuse_the_rest()

    def _on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def _begin(self, task: _Task) -> None:
        if self._failure is not None:
            task.pending.future.set_exception(self._failure)
            return
        if task.ready is not None:
            task.ready.wait()
        talk = Conversation(self.group, self.ledger, self._link, task.sequence, task.pending.about)
        self._advance(task.begin(talk), task.pending)

    def _advance(self, operation: Operation, pending: Pending) -> None:
        """Run an operation up to its next exchange, which is started, or to its end."""
        try:
            exchange = next(operation)
            exchange.start()
        except StopIteration:
            pending.future.set_result(self._mark())
        except Exception as error:
            self._break(pending, error)
        else:
            running = _Running(operation, exchange, pending)
            self._active.add(pending)
            if self._num_waiters:
                self._waits.put(running)
            else:  # what NCCL does is ordered by this thread's stream
                self._events.put(_Finished(running, _error_of(exchange)))

    def _go_on(self, finished: "_Finished") -> None:
        running, error = finished
        if running.pending not in self._active:  # given up, because another one failed
            return
        self._active.remove(running.pending)
        self._progress += 1
        if error is None:
            self._advance(running.operation, running.pending)
        else:
            self._break(running.pending, error)

    def _mark(self) -> torch.cuda.Event | None:
        if self._stream is None:
            return None
        done = torch.cuda.Event()
        done.record(self._stream)
        return done

    def _break(self, pending: Pending, error: Exception) -> None:
        """After one operation has failed none can be trusted to meet its counterpart."""
        self._failure = self._failure or error
        for each in (pending, *self._active):
            each.future.set_exception(error)
        self._active.clear()

    def _refuse_the_rest(self) -> None:
        while not self._events.empty():
            event = self._events.get()
            if isinstance(event, _Task):
                event.pending.future.set_exception(CapstanError("The communicator was closed."))

    # --- waiting ------------------------------------------------------------------------------------------

    def _wait_in_turn(self) -> None:
        """Gloo can only be waited for by blocking: some threads do that, and nothing else."""
        while (running := self._waits.get()) is not None:
            self._events.put(_Finished(running, _error_of(running.exchange)))


def _error_of(exchange: Exchange) -> Exception | None:
    """What went wrong with an exchange, once it is over."""
    try:
        exchange.finish()
    except Exception as error:
        return error
    return None
