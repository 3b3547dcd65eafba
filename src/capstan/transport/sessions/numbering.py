"""Exactly once: an update that is repeated because its answer was lost is not applied again."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

from capstan.errors import InputError, TimeoutExpired

T = TypeVar("T")


class NumberedAnswers(Generic[T]):
    """The last request of one session and its answer; requests are numbered 1, 2, …

    The next number is applied, the last one is answered as it was, any other is refused: a smaller one was
    recorded and is played again, a larger one means that updates are missing.
    """

    def __init__(self) -> None:
        self._lock, self._number = Lock(), 0
        self._answer: Future[T] = Future()

    def answer(self, number: int, apply: Callable[[], T], timeout_s: float) -> T:
        """What `apply` gave for this number: now, or when it first came, also if that is not done yet.

        Raises:
            InputError: neither the last number nor the next.
            TimeoutExpired: the first application is not done in `timeout_s`.
        """
        with self._lock:
            is_new = number == self._number + 1
            if not is_new and not 0 < number == self._number:
                raise InputError(
                    f"Wanted request {self._number + 1}, or {self._number} again, found {number}: it was "
                    "played again, or the server was started anew. Begin a new session."
                )
            if is_new:
                self._number, self._answer = number, Future()
            answer = self._answer
        if is_new:
            try:
                answer.set_result(apply())
            except BaseException as error:
                answer.set_exception(error)
        try:
            return answer.result(timeout_s)
        except TimeoutError as error:
            raise TimeoutExpired(f"Request {number} is not answered after {timeout_s} s.") from error
