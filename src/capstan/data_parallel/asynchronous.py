"""Asynchronous model averaging: weights are averaged in the background while every rank goes on training."""

import atexit
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING

import torch

from capstan.codecs import Compressor, codec_from_name
from capstan.data_parallel.algorithm import Algorithm
from capstan.errors import CapstanError, TimeoutExpired, UsageError
from capstan.transport import Conversation, Operation
from capstan.transport.collectives import average
from capstan.transport.failure import FirstFailure

if TYPE_CHECKING:
    from capstan.data_parallel.replica import Replica

logger = logging.getLogger(__name__)


class AsyncAverage(Algorithm):
    """Over and over: c = a copy of x; S = the sum of all copies; then x += S/n - c, between two steps.

    The sum of all ranks' weights is what it would have been without it, up to rounding. A step never
    waits for the network, only for copying. Ranks differ: call `Replica.average_weights` before
    evaluating or saving.

    Rounds need every rank, and each round agrees first whether all go on: when one calls `abort`, or
    `Replica.close`, all end with the same round, and nothing hangs. `resume` starts again when every rank
    has called it.

    Args:
        interval_s: the pause between two rounds.
        codec: in how many bits weights cross; what is lost of them is lost.

    Source: BAGUA's async model averaging. Differs: the vote on going on is part of every round, and every
    wait of it is bounded; there an abort could leave a rank waiting.
    """

    name = "async"
    steps_wait = False

    def __init__(self, interval_s: float = 0.5, *, codec: str = "identity") -> None:
        if interval_s < 0:
            raise UsageError(f"The pause between rounds is at least 0 s, found {interval_s}.")
        self.interval_s = interval_s
        self.codec = codec_from_name(codec)
        self.num_rounds = 0
        self._training, self._is_training = Lock(), False
        self._stopping = Event()
        self._thread: Thread | None = None
        self._failure = FirstFailure()

    @property
    def description(self) -> str:
        return f"{self.name}: every {self.interval_s} s, {self.codec.name}"

    def start(self, replica: "Replica") -> None:
        super().start(replica)
        self._compressor = Compressor(self.codec, salt=replica.group.rank)
        self._buckets = replica.weight_buckets()
        self._copies = [torch.empty_like(bucket.flat) for bucket in self._buckets]
        atexit.register(self._leave)
        self.resume()

    def before_forward(self) -> None:
        self._check()
        if not self._is_training:
            self._hold()

    def after_step(self) -> None:
        self._release()
        self._check()

    def abort(self) -> None:
        """End averaging on all ranks, with the round that is under way; then the weights are left alone."""
        self._release()
        self._stopping.set()
        if self._thread is not None:
            patience_s = 4 * self.replica.group.patience_s
            self._thread.join(timeout=patience_s + self.interval_s)
            if self._thread.is_alive():
                raise TimeoutExpired(f"Averaging did not end within {patience_s:.0f} s: is a rank stuck?")
        self._thread = None
        self._check()

    def resume(self) -> None:
        """Go on averaging; every rank must call it."""
        if self._thread is not None and self._thread.is_alive() and not self._stopping.is_set():
            return
        if self._thread is not None:
            self._thread.join(timeout=4 * self.replica.group.patience_s)
        self._stopping.clear()
        self._thread = Thread(target=self._run, name="capstan averaging", daemon=True)
        self._thread.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        was_running = self._thread is not None
        self.abort()
        try:
            yield
        finally:
            if was_running:
                self.resume()

    def close(self) -> None:
        atexit.unregister(self._leave)
        self.abort()

    def _leave(self) -> None:
        """A script that ends without `close` ends averaging, too: Python must not end beside its thread."""
        try:
            self.abort()
        except CapstanError as error:
            logger.warning("Averaging ended badly: %s", error)

    # --- in the background -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while self._all_go_on():
                    self._average_once()
                    self._stopping.wait(self.interval_s)
        except BaseException as error:
            self._failure.keep(error)
        self._stopping.set()

    def _all_go_on(self) -> bool:
        answers: list[bool] = []
        self.replica.submit(
            lambda talk: agreement(talk, not self._stopping.is_set(), answers), about="the vote on averaging"
        ).wait()
        return all(answers)

    def _average_once(self) -> None:
        with self._training:
            for bucket, copy in zip(self._buckets, self._copies, strict=True):
                copy.copy_(bucket.take_weights())
        pending = [
            self.replica.submit(
                partial(average, values=bucket.flat, compressor=self._compressor, key=bucket.key),
                about=bucket.key,
            )
            for bucket in self._buckets
        ]
        for each in pending:
            each.wait()
        with self._training:
            for bucket, copy in zip(self._buckets, self._copies, strict=True):
                changes = bucket.views_of(bucket.flat.sub_(copy))
                for parameter, change in zip(bucket.parameters, changes, strict=True):
                    parameter.add_(change)
        self.num_rounds += 1

    # --- the lock ----------------------------------------------------------------------------------------

    def _hold(self) -> None:
        patience_s = self.replica.group.patience_s
        until_s = time.monotonic() + patience_s
        if not self._training.acquire(timeout=max(0.0, until_s - time.monotonic())):
            raise TimeoutExpired(f"Averaging held the weights for {patience_s:.0f} s: is the device stuck?")
        self._is_training = True

    def _release(self) -> None:
        if self._is_training:
            self._is_training = False
            self._training.release()

    def _check(self) -> None:
        self._failure.check()


def agreement(talk: Conversation, own: bool, answers: list[bool]) -> Operation:
    """What every rank says, yes or no; put into `answers`."""
    vote, others = talk.round("vote"), [rank for rank in range(talk.size) if rank != talk.rank]
    vote.to(others, 1).fill_(own)
    arriving = [vote.take(rank, 1) for rank in others]
    yield vote
    answers.extend([own, *(bool(each.item()) for each in arriving)])
