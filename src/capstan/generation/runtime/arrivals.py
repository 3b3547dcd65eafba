"""Arrivals: sequences that join a job while it runs, and those that are wanted no more.

A job that is given arrivals has no end of its own. Between two sweeps it lets go of the sequences that nobody
waits for any longer, and takes as many new ones as it has free slots; with nothing to do it waits. Its memory
is that of the plan, so no sequence may be longer than the longest that was planned for.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from threading import Condition

from capstan.generation.planning.batching import BatchWork, Block, Length
from capstan.generation.runtime.sequences import Sequence


class Arrivals:
    """Where sequences wait for a running job; any thread may put them there.

    Those in a hurry are taken first, each kind in the order in which it came. Where all slots are taken, they
    get those of others, which wait again, before the rest of their kind, and keep their tokens.
    """

    def __init__(self) -> None:
        self._change = Condition()
        self._waiting: tuple[deque[Sequence], deque[Sequence]] = (deque(), deque())
        self._is_closed = False

    def put(self, sequences: Iterable[Sequence], *, in_a_hurry: bool = True) -> None:
        """Let sequences join when there is room."""
        sequences = list(sequences)
        for sequence in sequences:
            sequence.in_a_hurry = in_a_hurry
        with self._change:
            self._waiting[0 if in_a_hurry else 1].extend(sequences)
            self._change.notify_all()

    def put_back(self, sequences: Iterable[Sequence]) -> None:
        """Let sequences without hurry that had joined wait again, before all others of their kind."""
        with self._change:
            self._waiting[1].extendleft(sequences)

    def close(self) -> None:
        """No sequence will join any more, not even those that wait; the job ends with those that run."""
        with self._change:
            self._is_closed = True
            self._change.notify_all()

    def take(self, room: int, *, waits: bool) -> list[Sequence]:
        """At most `room` sequences that are still wanted; with `waits` at least one, unless closed."""
        with self._change:
            while True:
                taken = [] if self._is_closed else self._next(room)
                if taken or not waits or self._is_closed:
                    return taken
                self._change.wait()

    def _next(self, room: int) -> list[Sequence]:
        taken: list[Sequence] = []
        for waiting in self._waiting:
            while waiting and len(taken) < room:
                sequence = waiting.popleft()
                if sequence.is_wanted:
                    taken.append(sequence)
        return taken

    @property
    def num_in_a_hurry(self) -> int:
        """Those who wait and should not; none any more, once closed."""
        with self._change:
            return 0 if self._is_closed else sum(sequence.is_wanted for sequence in self._waiting[0])

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def num_waiting(self) -> int:
        """Sequences that have not been taken, those that are wanted no more included."""
        with self._change:
            return sum(map(len, self._waiting))


def open_lengths(longest: int, slots: int) -> list[Length]:
    """The lengths for which an engine is opened that will serve: a prompt and an answer of half of `longest`
    tokens each, and one prompt that fills it. No block starts more prompt tokens at once."""
    half = Length(longest // 2, longest - longest // 2)
    return [Length(longest - 1, 1), *[half] * (slots - 1)]


def open_turns(
    arrivals: Arrivals,
    block: Block,
    sequences: list[Sequence],
    *,
    on_join: Callable[[Sequence], None],
    on_leave: Callable[[Sequence], None],
) -> Iterator[list[BatchWork]]:
    """The sweeps of a block whose sequences come and go. `sequences` are those in the block by their number
    there, numbers of those that are gone being used again."""

    def leave(numbers: list[int]) -> list[Sequence]:
        block.finish(numbers)
        for number in numbers:
            on_leave(sequences[number])
        return [sequences[number] for number in numbers]

    while True:
        leave([number for number in block.unfinished() if not sequences[number].is_wanted])
        displaced = _shortest_without_hurry(block, sequences, arrivals.num_in_a_hurry - block.num_free)
        arrivals.put_back(leave(displaced))
        for sequence in arrivals.take(block.num_free, waits=not block.unfinished()):
            on_join(sequence)
            number = block.join(sequence.length)
            sequences[number : number + 1] = [sequence]
        works = block.sweep()
        if not works:
            return
        yield works


def _shortest_without_hurry(block: Block, sequences: list[Sequence], count: int) -> list[int]:
    """At most so many sequences that can give up their slots: those with the fewest tokens, since all of
    these are computed again when they come back."""
    patient = [number for number in block.unfinished() if not sequences[number].in_a_hurry]
    return sorted(patient, key=lambda number: sequences[number].length.prompt)[: max(0, count)]
