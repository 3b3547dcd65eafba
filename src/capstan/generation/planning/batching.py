"""Which sequences are computed together: slots, and who sits in them.

A *block* is what one sweep over the layers computes: several GPU batches, each with a number of slots that
have room for a number of tokens. Sequences wait in a queue, longest first, so that whoever is next always
fits where a longer one sat and neighbours are of similar length. A sequence that ends frees its slot, and
the next one starts in the same sweep in which the others go on.

In a block that is open, sequences join while others run; they wait in the order in which they came, and
prompts start only as far as the tokens in flight stay within what the block has room for.

A prefix that all sequences begin with is computed once, in a sweep of its own before all others, and every
sequence starts after it.

Nothing here knows a tensor: the planner runs the same code on lengths alone to predict every byte.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import NamedTuple

PREFIX_SLOT = -1


class Length(NamedTuple):
    """Tokens of a sequence: those that are given, and those to generate at most."""

    prompt: int
    new: int

    @property
    def cached(self) -> int:
        """Rows that it ever has in the cache: the last new token is never read again."""
        return self.prompt + self.new - 1


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """A GPU batch: so many slots, each with room for so many tokens."""

    slots: int
    capacity: int


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """The batches of a block, the most prompt tokens that pass through a layer at a time, and how many
    tokens all sequences begin with.

    The batches go through the layers in `waves`, each of which brings the weights anew: where layers are
    divided over several ranks, each rank is at another wave.
    """

    batches: tuple[BatchShape, ...]
    chunk_tokens: int
    prefix: int = 0
    waves: int = 1

    def wave(self, number: int) -> range:
        """The batches of a wave."""
        count = len(self.batches)
        return range(count * number // self.waves, count * (number + 1) // self.waves)

    @property
    def slots_at_once(self) -> int:
        """Slots of the largest wave."""
        waves = [self.wave(number) for number in range(self.waves)]
        return max(sum(self.batches[batch].slots for batch in wave) for wave in waves)

    @property
    def num_slots(self) -> int:
        return sum(batch.slots for batch in self.batches)

    def halved(self) -> "BlockShape | None":
        """Half the slots, or None when there is only one: what to try when memory ran out."""
        if self.num_slots <= 1:
            return None
        if len(self.batches) > 1:
            half = len(self.batches) // 2
            return replace(self, batches=self.batches[:half], waves=min(self.waves, half))
        batch = self.batches[0]
        return replace(self, batches=(replace(batch, slots=batch.slots // 2),))


@dataclass(frozen=True, kw_only=True)
class Work:
    """Tokens `start … start + count - 1` of a sequence that sits in a slot; `PREFIX_SLOT` is the prefix's."""

    sequence: int
    slot: int
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def is_prefix(self) -> bool:
        return self.slot == PREFIX_SLOT


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Work that passes through a layer at once: either whole prompts, or one token of each sequence."""

    is_prefill: bool
    works: tuple[Work, ...]

    @property
    def num_tokens(self) -> int:
        return sum(work.count for work in self.works)

    def runs(self) -> Iterator[tuple[Work, slice]]:
        """Each piece of work with its run of the chunk's tokens."""
        start = 0
        for work in self.works:
            yield work, slice(start, start + work.count)
            start += work.count


class InFlight(NamedTuple):
    """The most tokens that may pass through an open block at once: in a sweep, and in one of its batches."""

    sweep_tokens: int
    batch_tokens: int


class BatchWork(NamedTuple):
    """What one GPU batch does in one sweep."""

    batch: int
    chunks: tuple[Chunk, ...]


@dataclass
class _Seat:
    sequence: int
    length: Length
    num_done: int = 0  # tokens whose keys and values are in the cache


@dataclass
class Block:
    """The slots of a block and the queue before it.

    `sweep()` says what to compute next; `finish()` reports sequences that ended early. Sequences that have
    generated all their tokens leave by themselves. With `most`, the block is open to those who `join()`; its
    batches are then of one capacity.
    """

    shape: BlockShape
    lengths: Sequence[Length]
    most: InFlight | None = None
    _lengths: list[Length] = field(init=False)
    _numbers: list[int] = field(init=False, default_factory=list)  # of sequences that are gone
    _queue: list[int] = field(init=False)
    _seats: list[list[_Seat | None]] = field(init=False)
    _has_prefix: bool = field(init=False, default=False)  # computed, or not needed

    def __post_init__(self) -> None:
        self._has_prefix = not self.shape.prefix
        self._lengths = list(self.lengths)
        by_length = sorted(range(len(self.lengths)), key=lambda index: (-self.lengths[index].cached, index))
        self._queue = by_length[::-1]  # the longest is popped first
        self._seats = [[None] * batch.slots for batch in self.shape.batches]

    @property
    def num_running(self) -> int:
        return sum(seat is not None for seats in self._seats for seat in seats)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_free(self) -> int:
        """Slots for which nobody waits."""
        return max(0, self.shape.num_slots - self.num_running - self.num_waiting)

    def join(self, length: Length) -> int:
        """Let a sequence wait behind all others; returns its number, which one that is gone may have had."""
        number = self._numbers.pop() if self._numbers else len(self._lengths)
        self._lengths[number : number + 1] = [length]
        self._queue.insert(0, number)
        return number

    def unfinished(self) -> list[int]:
        """Sequences that run or wait."""
        running = [seat.sequence for seats in self._seats for seat in seats if seat is not None]
        return sorted([*running, *self._queue])

    def turns(self) -> Iterator[list[BatchWork]]:
        """Sweeps over one wave after the other, empty ones where a wave has nothing to do, until all is done.

        Before a wave's next sweep, those of its sequences that have ended must have been reported.
        """
        num_idle = 0
        for wave in cycle(range(self.shape.waves)):
            works = self.sweep(wave)
            num_idle = 0 if works else num_idle + 1
            if num_idle == self.shape.waves:
                return
            yield works

    def sweep(self, wave: int = 0) -> list[BatchWork]:
        """The work of a wave's next sweep, batch by batch; empty when all is done. Counts it as done."""
        if not self._has_prefix and self._queue:
            self._has_prefix = True
            work = Work(sequence=self._queue[-1], slot=PREFIX_SLOT, start=0, count=self.shape.prefix)
            return [BatchWork(0, (Chunk(is_prefill=True, works=(work,)),))]
        batches = self.shape.wave(wave)
        self._admit(batches)
        works = [BatchWork(index, tuple(self._chunks(self._seats[index]))) for index in batches]
        return [work for work in works if work.chunks]

    def advance(self) -> list[int]:
        """Sequences that have just generated their last token; their slots are free."""
        ended = [
            seat.sequence
            for seats in self._seats
            for seat in seats
            if seat is not None and seat.num_done >= seat.length.cached
        ]
        self.finish(ended)
        return ended

    @property
    def goes_on(self) -> bool:
        """Whether a sweep follows the one that `sweep()` gave last, if no sequence ends early."""
        running = [seat for seats in self._seats for seat in seats if seat is not None]
        return bool(self._queue) or any(seat.num_done < seat.length.cached for seat in running)

    def finish(self, sequences: Sequence[int]) -> None:
        """Free the slots of these sequences, or their places in the queue."""
        gone = set(sequences)
        if not gone.isdisjoint(self._queue):
            self._numbers += gone.intersection(self._queue)
            self._queue = [number for number in self._queue if number not in gone]
        for seats in self._seats:
            for slot, seat in enumerate(seats):
                if seat is not None and seat.sequence in gone:
                    self._numbers.append(seat.sequence)
                    seats[slot] = None

    def _admit(self, batches: Sequence[int]) -> None:
        left = self._left()
        for index in batches:
            seats = self._seats[index]
            for slot, seat in enumerate(seats):
                if seat is None and self._queue:
                    length = self._lengths[self._queue[-1]]
                    fits = length.cached <= self.shape.batches[index].capacity
                    if fits and (left is None or left.admit(index, length.prompt)):
                        seats[slot] = _Seat(self._queue.pop(), length, self.shape.prefix)

    def _left(self) -> "_Left | None":
        """How many more tokens may be in flight in the next sweep, in which those who are seated have one."""
        if self.most is None:
            return None
        seated = [sum(seat is not None for seat in seats) for seats in self._seats]
        return _Left(
            self.most.sweep_tokens - sum(seated), [self.most.batch_tokens - count for count in seated]
        )

    def _chunks(self, seats: list[_Seat | None]) -> Iterator[Chunk]:
        decoding: list[Work] = []
        prompts: list[Work] = []
        for slot, seat in enumerate(seats):
            if seat is None:
                continue
            decodes = seat.num_done >= seat.length.prompt
            count = 1 if decodes else seat.length.prompt - seat.num_done
            work = Work(sequence=seat.sequence, slot=slot, start=seat.num_done, count=count)
            (decoding if decodes else prompts).append(work)
            seat.num_done += count
        if decoding:
            yield Chunk(is_prefill=False, works=tuple(decoding))
        yield from _whole_prompts(prompts, self.shape.chunk_tokens)


@dataclass
class _Left:
    """Tokens that may still be in flight."""

    in_sweep: int
    in_batch: list[int]

    def admit(self, batch: int, num_tokens: int) -> bool:
        """Take so many of them, if they are left."""
        if num_tokens > min(self.in_sweep, self.in_batch[batch]):
            return False
        self.in_sweep -= num_tokens
        self.in_batch[batch] -= num_tokens
        return True


def _whole_prompts(prompts: list[Work], chunk_tokens: int) -> Iterator[Chunk]:
    """Prompts gathered into chunks of at most `chunk_tokens`; one that is longer goes alone."""
    gathered: list[Work] = []
    for work in prompts:
        if gathered and sum(each.count for each in gathered) + work.count > chunk_tokens:
            yield Chunk(is_prefill=True, works=tuple(gathered))
            gathered = []
        gathered.append(work)
    if gathered:
        yield Chunk(is_prefill=True, works=tuple(gathered))


def shape_for(
    lengths: Sequence[Length], *, slots: int, batches: int, chunk_tokens: int, prefix: int = 0
) -> BlockShape:
    """A block of `batches` GPU batches of `slots` slots for these sequences, without idle slots.

    Capacities fall from batch to batch as the queue does: batch k has room for its longest first guest.
    """
    ordered = sorted((length.cached for length in lengths), reverse=True)
    shapes = []
    for index in range(batches):
        guests = ordered[index * slots : (index + 1) * slots]
        if guests:
            shapes.append(BatchShape(slots=len(guests), capacity=guests[0]))
    return BlockShape(batches=tuple(shapes), chunk_tokens=chunk_tokens, prefix=prefix)
