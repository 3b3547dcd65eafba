"""Reading rows in an order: buffers that are filled in the background, batches in the order's positions."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from capstan.errors import InputError, UsageError
from capstan.plans import Traffic, link_name
from capstan.shuffling.order import Order, Piece, Refill, num_steps
from capstan.shuffling.randomness import Indices
from capstan.shuffling.sources import FetchesAhead, SizedBlocks
from capstan.storage import BlockSource, Rows

LINK = link_name("disk", "host")
CONTENT = "rows"


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which of an epoch's rows one reader takes, and in what steps.

    Step t has the positions from t·batch_size to (t+1)·batch_size; rank r of W takes those of them that
    leave r when divided by W.

    Raises:
        UsageError: ranks that do not divide the streams or the batch, or that do not exist.
    """

    order: Order
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"A batch has at least one row; batch_size is {self.batch_size}.")
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"There are ranks 0 to {self.world_size - 1}; this is rank {self.rank}.")
        for name, count in (("num_streams", self.order.num_streams), ("batch_size", self.batch_size)):
            if count % self.world_size:
                raise UsageError(
                    f"{name} is {count}, which {self.world_size} readers (ranks × workers) do not divide. "
                    f"Take a multiple of {self.world_size}, or as many readers as divide it."
                )

    @property
    def num_steps(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return num_steps(self.order.num_rows, self.batch_size, self.order.num_streams)

    @property
    def streams(self) -> range:
        """The streams whose rows this reader takes."""
        return range(self.rank, self.order.num_streams, self.world_size)

    def rows_of(self, step: int, stream: int) -> int:
        """How many rows of one stream a step has."""
        return _first_row(self._end(step), stream, self.order) - _first_row(
            step * self.batch_size, stream, self.order
        )

    def _end(self, step: int) -> int:
        return min((step + 1) * self.batch_size, self.order.num_rows)

    def places(self, step: int, stream: int) -> slice:
        """Where in this reader's part of the batch the rows of a stream go: evenly apart."""
        per_round = len(self.streams)
        start = step * self.batch_size
        # The reader's positions are start' , start' + W, …, where start' is its first one from `start` on.
        mine = start + (self.rank - start) % self.world_size
        streams_first = start + (stream - start) % self.order.num_streams
        return slice((streams_first - mine) // self.world_size, None, per_round)

    def batch_rows(self, step: int) -> int:
        """Rows of this reader's part of a step."""
        return sum(self.rows_of(step, stream) for stream in self.streams)


def _first_row(position: int, stream: int, order: Order) -> int:
    """The first row of a stream that lies at this position of the epoch or later."""
    return max(0, -(-(position - stream) // order.num_streams))


@dataclass
class Account:
    """What reading did cost: bytes, blocks, seconds that it worked and that it was awaited."""

    size_bytes: int = 0
    num_blocks: int = 0
    reading_s: float = 0.0
    waiting_s: float = 0.0

    @property
    def traffic(self) -> Traffic:
        return Traffic({(LINK, CONTENT): self.size_bytes})


class Batches:
    """The batches of one epoch from a step on, each a mapping from column to array.

        with Batches(source, Share(order=order, batch_size=128)) as batches:
            for rows in batches:
                ...

    One thread reads the next buffer of each stream while the present one is emitted, so that two buffers are
    held at most. Leaving the block ends the thread.

    Raises:
        InputError: the blocks are not those of the order, or a block cannot be read.
    """

    def __init__(
        self, source: BlockSource, share: Share, *, start_step: int = 0, account: Account | None = None
    ) -> None:
        sizes = tuple(source.num_rows(block) for block in range(source.num_blocks))
        if sizes != share.order.sizes:
            raise InputError("The order is of other blocks than those of the source. Make it anew.")
        if not 0 <= start_step <= share.num_steps:
            raise UsageError(f"An epoch has steps 0 to {share.num_steps}; wanted step {start_step}.")
        self._source, self._share, self._step = source, share, start_step
        self.account = account or Account()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="capstan-reader")
        start = start_step * share.batch_size
        self._streams = {
            stream: _Stream(
                self._thread,
                source,
                share.order.refills(stream, _first_row(start, stream, share.order)),
                _first_row(start, stream, share.order),
                self.account,
            )
            for stream in share.streams
        }

    def __iter__(self) -> Iterator[Rows]:
        while self._step < self._share.num_steps:
            step, self._step = self._step, self._step + 1
            yield self._batch(step)

    def _batch(self, step: int) -> Rows:
        share = self._share
        if len(self._streams) == 1:
            (stream,) = share.streams
            return joined_rows(self._streams[stream].take(share.rows_of(step, stream)))
        total = share.batch_rows(step)
        batch: dict[str, NDArray[np.generic]] = {}
        for stream in share.streams:
            count, places = share.rows_of(step, stream), share.places(step, stream)
            if not count:
                continue
            for name, values in joined_rows(self._streams[stream].take(count)).items():
                wider = batch.get(name)
                if wider is None or wider.dtype != values.dtype:
                    kind = values.dtype if wider is None else np.result_type(wider, values)
                    made = np.empty((total, *values.shape[1:]), kind)
                    if wider is not None:
                        made[:] = wider
                    batch[name] = made
                batch[name][places][: len(values)] = values
        return batch

    def close(self) -> None:
        """End the reading thread; what it reads just now is finished first."""
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Stream:
    """The rows of one stream: the present buffer, and the next one being read."""

    def __init__(
        self,
        thread: ThreadPoolExecutor,
        source: BlockSource,
        refills: Iterator[Refill],
        start: int,
        account: Account,
    ) -> None:
        self._thread, self._source, self._refills = thread, source, refills
        self._start, self._account = start, account
        self._kept: Rows = {}
        self._now: Rows = {}
        self._at = self._available = 0
        self._next: Future[Rows | None] = thread.submit(self._fill)

    def take(self, count: int) -> list[Rows]:
        """The next rows, in as many parts as buffers that they come from."""
        parts: list[Rows] = []
        while count:
            if self._at == self._available:
                self._advance()
            taken = min(count, self._available - self._at)
            if taken:
                rows = slice(self._at, self._at + taken)
                parts.append({name: column[rows] for name, column in self._now.items()})
            self._at, count = self._at + taken, count - taken
        return parts

    def _advance(self) -> None:
        self._now = {}  # let go of before the next but one is read
        started = time.perf_counter()
        rows = self._next.result()
        self._account.waiting_s += time.perf_counter() - started
        assert rows is not None, "a stream has as many rows as its order says"
        self._next = self._thread.submit(self._fill)
        self._now, self._at = rows, 0
        self._available = row_count(rows)

    def _fill(self) -> Rows | None:
        started = time.perf_counter()
        refill = next(self._refills, None)
        if refill is None:
            return None
        parts = [self._kept] if self._kept else []
        for piece, following in zip_longest(refill.pieces, refill.pieces[1:]):
            if following and isinstance(self._source, FetchesAhead):
                self._source.will_read(following.block)
            parts.append(read_piece(self._source, piece, self._account))
        emit = refill.emit[max(0, self._start - refill.first) :]
        rows, self._kept = gathered(parts, emit), gathered(parts, refill.keep)
        self._account.reading_s += time.perf_counter() - started
        return rows


def read_piece(source: BlockSource, piece: Piece, account: Account) -> Rows:
    """The rows of a piece, counted in `account`."""
    whole = source.read(piece.block)
    account.num_blocks += 1
    account.size_bytes += stored_bytes(source, piece.block, whole)
    if isinstance(piece.rows, slice) and piece.num_rows == source.num_rows(piece.block):
        return whole
    return {name: column[piece.rows] for name, column in whole.items()}


def stored_bytes(source: BlockSource, block: int, rows: Rows | None = None) -> int:
    """Bytes that reading a block brings: what the source says, else what the arrays hold."""
    if isinstance(source, SizedBlocks):
        return source.size_bytes(block)
    return sum(column.nbytes for column in (rows if rows is not None else source.read(block)).values())


def row_count(rows: Rows) -> int:
    """How many rows there are."""
    return len(next(iter(rows.values()))) if rows else 0


def gathered(parts: Sequence[Rows], index: Indices) -> Rows:
    """The rows `index` of the parts one after the other, without making that whole first.

    Raises:
        InputError: the parts have columns of other names or shapes.
    """
    if not len(index):
        return {}
    total = sum(map(row_count, parts))
    target = np.full(total, -1, np.int64)
    target[index] = np.arange(len(index))
    require_alike(parts)
    found: dict[str, NDArray[np.generic]] = {}
    for name, first in parts[0].items():
        kind = np.result_type(*(part[name].dtype for part in parts))
        values = np.empty((len(index), *first.shape[1:]), kind)
        at = 0
        for part in parts:
            column = part[name]
            places = target[at : at + len(column)]
            at += len(column)
            wanted = places >= 0
            if wanted.all():
                values[places] = column
            else:
                values[places[wanted]] = column[wanted]
        found[name] = values
    return found


def joined_rows(parts: Sequence[Rows]) -> Rows:
    """Parts one after the other."""
    if len(parts) == 1:
        return parts[0]
    require_alike(parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def require_alike(parts: Sequence[Rows]) -> None:
    """Raise `InputError` unless all have the same columns and shapes."""
    first = {name: column.shape[1:] for name, column in parts[0].items()} if parts else {}
    for part in parts[1:]:
        found = {name: column.shape[1:] for name, column in part.items()}
        if found != first:
            raise InputError(f"Blocks have different columns: {first} and {found}. Write them alike.")
