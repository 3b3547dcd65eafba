"""The order of an epoch, as a pure function: sizes of blocks, seed and epoch in, addresses of rows out.

    order = Order(sizes=(800,) * 500, seed=7, epoch=0, buffer_blocks=50)
    order.addresses()                    # (400_000, 2): block and row of each position
    for refill in order.refills(0):      # what to read, and in which order to emit it
        ...

No block is read, no clock and no global random state is used, and no epoch depends on those before it: any
position can be computed on any machine, which is what makes resuming exact.

Streams. The blocks in their order make one long row of rows. It is cut into `num_streams` stretches whose
lengths differ by at most one, and position p of the epoch is row p // num_streams of stream
p % num_streams. On W ranks, where W divides the number of streams, rank r takes the positions that leave r
when divided by W: these are whole streams, so a rank reads its share only, and the order is the same for
every W. A block that lies across a cut is read by both streams.

Source: CorgiPile (SIGMOD 2022), section on the two-level shuffle; baselines as it compares them.
Differs: a buffer is filled by blocks, not by rows, and an epoch's buffers are equally large as far as blocks
allow; the reservoir does not replay rows of the epoch before
and emits what it holds at the end, so that every epoch visits each row once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from capstan.errors import UsageError, unknown_name
from capstan.shuffling.exchange import PASSES, exchange
from capstan.shuffling.randomness import Indices, below, permutation

STRATEGIES = {
    "corgipile": "blocks in random order, and the rows of a buffer of blocks shuffled together",
    "full": "all rows in random order; the whole table is held in memory",
    "none": "rows as they are stored",
    "block": "blocks in random order, their rows as they are stored",
    "window": "a sliding window over the rows as they are stored",
    "reservoir": "multiplexed reservoir sampling over the rows as they are stored",
}
_BLOCKS, _ROWS, _SLOTS, _REST = range(4)  # what randomness is for: part of its key


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows of one block: from one to another, or those that are listed."""

    block: int
    rows: slice | Indices

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)

    def addresses(self) -> Indices:
        """(rows, 2): block and row."""
        rows = np.arange(self.rows.start, self.rows.stop) if isinstance(self.rows, slice) else self.rows
        return np.stack([np.full(len(rows), self.block, np.int64), rows], axis=1)


@dataclass(frozen=True, kw_only=True)
class Refill:
    """One filling of a stream's buffer: read `pieces`, emit some rows, keep some for the next.

    `emit` and `keep` index the rows kept so far followed by those of the pieces. `first` is the stream's row
    that is emitted first.
    """

    first: int
    pieces: tuple[Piece, ...]
    emit: Indices
    keep: Indices


_NOTHING = np.empty(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of the rows of one epoch; see the head of this file.

    `buffer_blocks` is the whole buffer, in blocks: a stream has max(1, buffer_blocks // num_streams) of them.

    Raises:
        UsageError: no rows, an unknown strategy, or a number below 1 (seed and epoch: below 0).
    """

    sizes: tuple[int, ...]
    seed: int
    epoch: int = 0
    strategy: str = "corgipile"
    buffer_blocks: int = 1
    num_streams: int = 1

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise unknown_name("strategy", self.strategy, STRATEGIES)
        for name, least in (("seed", 0), ("epoch", 0), ("buffer_blocks", 1), ("num_streams", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}; give {least} or more.")
        if any(size < 0 for size in self.sizes) or not sum(self.sizes):
            raise UsageError(f"There is no row to order in {len(self.sizes)} blocks.")

    def at_epoch(self, epoch: int) -> "Order":
        """The same for another epoch."""
        return replace(self, epoch=epoch)

    @cached_property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return sum(self.sizes)

    @property
    def blocks_per_stream(self) -> int:
        """Blocks that a stream's buffer holds."""
        if self.strategy == "full":
            return len(self.sizes)
        return min(len(self.sizes), max(1, self.buffer_blocks // self.num_streams))

    def stream_rows(self, stream: int) -> int:
        """Rows of one stream: of the positions those that are its own."""
        return -(-(self.num_rows - stream) // self.num_streams)

    def refills(self, stream: int, start: int = 0) -> Iterator[Refill]:
        """How a stream is read, from the refill that emits row `start` of the stream."""
        if self.strategy == "full":
            return self._one_refill(stream)
        if self.strategy in ("window", "reservoir"):
            return self._exchanges(stream, start)
        return self._buffers(stream, start)

    def addresses(self) -> Indices:
        """(rows, 2): block and row in the block of every position; reading does not need it."""
        found = np.empty((self.num_rows, 2), np.int64)
        for stream in range(self.num_streams):
            found[stream :: self.num_streams] = self.stream_addresses(stream)
        return found

    def stream_addresses(self, stream: int, start: int = 0) -> Indices:
        """(rows, 2): block and row in the block of the stream's rows from `start`."""
        emitted, kept = [], np.empty((0, 2), np.int64)
        for refill in self.refills(stream, start):
            held = np.concatenate([kept, *(piece.addresses() for piece in refill.pieces)])
            emitted.append(held[refill.emit][max(0, start - refill.first) :])
            kept = held[refill.keep]
        return np.concatenate(emitted) if emitted else np.empty((0, 2), np.int64)

    def block_reads(self) -> NDArray[np.int64]:
        """How often each block is read in the epoch: once, and once more for each cut across it."""
        counts = np.zeros(len(self.sizes), np.int64)
        for stream in range(self.num_streams):
            for piece in self._pieces(stream):
                counts[piece.block] += 1
        return counts

    # --- blocks of a stream ------------------------------------------------------------------------------

    @cached_property
    def _sequence(self) -> tuple[Indices, Indices]:
        """Blocks with rows, in the epoch's order, and how many rows come before each and after the last."""
        blocks = np.flatnonzero(np.asarray(self.sizes))
        if self.strategy in ("corgipile", "block"):
            blocks = blocks[permutation(len(blocks), self.seed, self.epoch, _BLOCKS)]
        ends = np.cumsum(np.asarray(self.sizes, np.int64)[blocks])
        return blocks, np.append(0, ends)

    def _pieces(self, stream: int) -> list[Piece]:
        blocks, before = self._sequence
        if self.strategy == "full":
            return [Piece(block=int(block), rows=slice(0, self.sizes[block])) for block in blocks]
        longer = self.num_rows % self.num_streams
        low = stream * (self.num_rows // self.num_streams) + min(stream, longer)
        high = low + self.stream_rows(stream)
        if low == high:
            return []
        first = int(np.searchsorted(before, low, side="right")) - 1
        last = int(np.searchsorted(before, high, side="left"))
        found = []
        for at in range(first, last):
            start, block = int(before[at]), int(blocks[at])
            rows = slice(max(low - start, 0), min(high - start, self.sizes[block]))
            found.append(Piece(block=block, rows=rows))
        return found

    # --- refills -----------------------------------------------------------------------------------------

    def _one_refill(self, stream: int) -> Iterator[Refill]:
        emit = permutation(self.num_rows, self.seed, self.epoch, _ROWS)[stream :: self.num_streams]
        yield Refill(first=0, pieces=tuple(self._pieces(stream)), emit=emit, keep=_NOTHING)

    def _buffers(self, stream: int, start: int) -> Iterator[Refill]:
        first, whole = 0, self._pieces(stream)
        count_of_refills = -(-len(whole) // self.blocks_per_stream)
        for index in range(count_of_refills):
            # Evenly: a last buffer of a single block would end the epoch in one cluster.
            low, high = (len(whole) * at // count_of_refills for at in (index, index + 1))
            pieces = tuple(whole[low:high])
            count = sum(piece.num_rows for piece in pieces)
            if first + count > start:
                emit = (
                    permutation(count, self.seed, self.epoch, _ROWS, stream, index)
                    if self.strategy == "corgipile"
                    else np.arange(count, dtype=np.int64)
                )
                yield Refill(first=first, pieces=pieces, emit=emit, keep=_NOTHING)
            first += count

    def _exchanges(self, stream: int, start: int) -> Iterator[Refill]:
        """Of a window or a reservoir: as each piece arrives, and at the end what is left, shuffled."""
        blocks, _ = self._sequence
        size = round(self.buffer_blocks * self.num_rows / len(blocks) / self.num_streams)
        size = min(max(1, size), self.stream_rows(stream))
        first, arrived, skipping = 0, 0, start > 0
        kept = np.empty((0, 2), np.int64)
        for index, piece in enumerate([*self._pieces(stream), None]):
            if piece is None:
                emit, keep = permutation(size, self.seed, self.epoch, _REST, stream), _NOTHING
            else:
                emit, keep = self._arrive(stream, index, piece.num_rows, arrived, size)
                arrived += piece.num_rows
            pieces = () if piece is None else (piece,)
            if not skipping:
                yield Refill(first=first, pieces=pieces, emit=emit, keep=keep)
            elif first + len(emit) > start:
                yield self._rebuilt(first, kept, pieces, emit, keep)
                skipping = False
            else:
                kept = np.concatenate([kept, *(each.addresses() for each in pieces)])[keep]
            first += len(emit)

    def _arrive(
        self, stream: int, index: int, count: int, arrived: int, size: int
    ) -> tuple[Indices, Indices]:
        """What is emitted and kept when `count` rows arrive after `arrived` others at a buffer of `size`."""
        filling = min(count, max(0, size - arrived))
        key = (self.seed, self.epoch, _SLOTS, stream, index)
        if self.strategy == "window":
            slots = below(size, count - filling, *key)
        else:
            slots = below(np.arange(arrived + filling, arrived + count) + 1, count - filling, *key)
            slots[slots >= size] = PASSES
        if filling == count:
            return _NOTHING, np.arange(arrived + count, dtype=np.int64)
        return exchange(slots, size)

    @staticmethod
    def _rebuilt(
        first: int, kept: Indices, pieces: tuple[Piece, ...], emit: Indices, keep: Indices
    ) -> Refill:
        """A refill that begins by reading what the buffer would hold, from the blocks that it came from."""
        by_block = np.argsort(kept[:, 0], kind="stable")
        new_place = np.empty(len(kept), np.int64)
        new_place[by_block] = np.arange(len(kept))
        held = kept[by_block]
        blocks, starts = np.unique(held[:, 0], return_index=True)
        ends = np.append(starts, len(held))[1:]
        again = [
            Piece(block=int(block), rows=held[start:end, 1])
            for block, start, end in zip(blocks, starts, ends, strict=True)
        ]
        arrived = sum(piece.num_rows for piece in pieces)
        place = np.append(new_place, np.arange(len(kept), len(kept) + arrived))
        return Refill(first=first, pieces=(*again, *pieces), emit=place[emit], keep=place[keep])


def num_steps(num_rows: int, batch_size: int, num_streams: int) -> int:
    """Steps of an epoch, the same on every rank.

    A last batch that is short counts if each stream can still give a row, so that no rank of any world size
    is left without; else its rows, fewer than there are streams, are left out of this epoch.
    """
    whole, rest = divmod(num_rows, batch_size)
    return whole + (rest >= num_streams)
