"""The zig-zag block schedule: one sweep over the layers computes a step of every batch.

    for each layer:
        for each GPU batch:        next layer's weights, next batch's cache and hidden states on their way in,
            compute                last batch's new keys and values and hidden states on their way out

Weights cross the link once for a whole block instead of once for a batch; that is where throughput comes
from. Waiting is by tickets for what is needed next, never for the whole device.

Source: FlexGen, section 4.1 and algorithm 1, arXiv 2303.06865.
Differs: prompts start and sequences end in any sweep (the paper's blocks start and end together), so there
is no separate prefill pass; nothing is padded; copies are ordered by events, not by a barrier per step. A
visit whose rows are away from the device stops inside its attention, and the device goes on with the next
batches, until its rows or results have come.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from capstan.generation.activations import Activations
from capstan.generation.anatomy import Anatomy
from capstan.generation.attention import FUSED_ATTENTION, prefill_attention
from capstan.generation.batching import BatchWork, Chunk, Work
from capstan.generation.decoding import Decoding
from capstan.generation.exchange import Exchange
from capstan.generation.kv_cache import KeyValueCache
from capstan.generation.recording import TAPES, Cut, NewTape, Recording, Standing
from capstan.generation.skeleton import LayerCall, Skeleton
from capstan.generation.weights import WeightStore
from capstan.transport import Ledger, Stopwatch, stream_of

logger = logging.getLogger(__name__)

DEVICE_COMPUTE = "device compute"

# Devices that compute while they wait for rows or for the host.
_OVERLAPPING = ("cuda",)


class Visit(NamedTuple):
    """One layer over one GPU batch."""

    layer: int
    batch: int


def zigzag(num_layers: int, batches: Sequence[int]) -> list[Visit]:
    """The order of visits in a sweep: all batches of a layer before the next layer."""
    return [Visit(layer, batch) for layer in range(num_layers) for batch in batches]


class Pick(NamedTuple):
    """A place whose logits are wanted: the token at `position` of `sequence`, which predicts the next."""

    sequence: int
    position: int


def picks_of(work: BatchWork, positions_of: "PositionsOf") -> list[tuple[Pick, int]]:
    """The places of a batch whose logits are wanted, each with its row in the batch's hidden states."""
    picks: list[tuple[Pick, int]] = []
    start = 0
    for each in (each for chunk in work.chunks for each in chunk.works):
        first = start - each.start
        picks += [(Pick(each.sequence, position), first + position) for position in positions_of(each)]
        start += each.count
    return picks


TokensOf = Callable[[Work], Sequence[int]]
PositionsOf = Callable[[Work], range]
OnLogits = Callable[[Sequence[Pick], Tensor], None]


@dataclass
class _Batch:
    """What one batch carries through a sweep."""

    work: BatchWork
    calls: list[list[LayerCall]]  # for each chunk, the call of each layer

    def runs(self) -> list[tuple[Chunk, list[LayerCall], slice]]:
        """Each chunk with its calls and its run of the batch's tokens."""
        runs, start = [], 0
        for chunk, calls in zip(self.work.chunks, self.calls, strict=True):
            runs.append((chunk, calls, slice(start, start + chunk.num_tokens)))
            start += chunk.num_tokens
        return runs


class _Passage(greenlet):
    """A visit under way. It can stop inside its attention, deep in transformers' code, and be resumed."""

    visit: Visit
    chunk: Chunk
    standing: Standing | None  # of the batch that decodes
    recording: Recording | None  # being made


class BlockSchedule:
    """Runs sweeps. Owns no memory: weights, cache and activations are given to it."""

    def __init__(
        self,
        skeleton: Skeleton,
        anatomy: Anatomy,
        weights: WeightStore,
        activations: Activations,
        *,
        cache: KeyValueCache | None,
        exchange: Exchange | None,
        logit_rows: int,
        device: torch.device,
        ledger: Ledger,
        stopwatch: Stopwatch,
    ) -> None:
        self._skeleton, self._anatomy = skeleton, anatomy
        self._weights, self._activations, self._cache = weights, activations, cache
        self._exchange = exchange  # with the ranks that have the layers before and after
        self._logit_rows, self._device, self._ledger = logit_rows, device, ledger
        self._stopwatch = stopwatch
        # Hidden states that rest elsewhere have room on the device for two batches only.
        self._overlaps = device.type in _OVERLAPPING and activations.rests_on_device
        self._stopped: deque[_Passage] = deque()
        self._left: Counter[int] = Counter()  # batches that have not passed each layer that was begun
        self._stream = stream_of(device, "compute")
        # What is recorded finds the hidden states where they always lie.
        self._new_tapes = TAPES.get(device.type) if activations.rests_on_device else None
        self._tapes_of: dict[int, NewTape] = {}
        self._standings: WeakKeyDictionary[Decoding, Standing] = WeakKeyDictionary()
        self._unit_places = 0  # says where the current layer's weights lie
        self._stop_clock: Callable[[], None] | None = None

    @torch.inference_mode()
    def sweep(
        self,
        works: Sequence[BatchWork],
        tokens_of: TokensOf,
        positions_of: PositionsOf,
        on_logits: OnLogits,
        *,
        is_last: bool = True,
    ) -> None:
        """Compute one sweep.

        Args:
            tokens_of: the token ids of a piece of work.
            positions_of: at which positions of it logits are wanted.
            on_logits: gets places and their logits `[places, vocabulary]`, a few rows at a time.
            is_last: False if another sweep will follow, whose first weights may then begin to arrive.
        """
        with self._on_stream(), self._computing():
            self._sweep(works, tokens_of, positions_of, on_logits, is_last=is_last)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """The device computes on a stream of its own: the default one cannot be recorded."""
        if self._stream is None:
            yield
            return
        outer = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream), sdpa_kernel(FUSED_ATTENTION):
            yield
        outer.wait_stream(self._stream)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Book what is done inside as computing, except in `_waiting`."""
        self._stop_clock = self._stopwatch.start(DEVICE_COMPUTE)
        try:
            yield
        finally:
            self._stop_clock()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Waits inside are no computing."""
        assert self._stop_clock is not None
        self._stop_clock()
        try:
            yield
        finally:
            self._stop_clock = self._stopwatch.start(DEVICE_COMPUTE)

    def _sweep(
        self,
        works: Sequence[BatchWork],
        tokens_of: TokensOf,
        positions_of: PositionsOf,
        on_logits: OnLogits,
        *,
        is_last: bool,
    ) -> None:
        self._skeleton.attend_with(self._attend)  # each time: another job may have run in between
        visits = zigzag(self._skeleton.num_layers, [work.batch for work in works])
        self._weights.expect(sweeps=1 if is_last else 2)
        if self._exchange is not None:
            self._exchange.begin()
        self._activations.begin({work.batch: _num_tokens(work) for work in works})
        if self._cache is not None:
            self._cache.begin(works)
        try:
            batches = {work.batch: self._front(work, tokens_of) for work in works}
            self._activations.prefetch(visits[0].batch)
            for visit, following in zip(visits, [*visits[1:], None], strict=True):
                self._finish_until_free(visit)
                if visit.batch == works[0].batch:
                    self._begin_layer(visit.layer, len(works))
                if following is not None and following.batch != visit.batch:
                    self._activations.prefetch(following.batch)
                self._start(visit, batches[visit.batch])
            self._finish_all()
        except BaseException:
            self._abandon()
            raise
        last_unit = self._take(self._skeleton.num_layers)
        for batch in batches.values():
            hidden = self._activations.take(batch.work.batch)
            if self._exchange is None or self._exchange.has_back:
                self._back(batch, hidden, last_unit[self._skeleton.head], positions_of, on_logits)
            else:
                self._exchange.send(hidden)
        self._weights.release()

    # --- passages ----------------------------------------------------------------------------------------

    def _begin_layer(self, layer: int, num_batches: int) -> None:
        """Give a layer its weights. While they are still on their way, stopped passages are finished."""
        while self._stopped and (self._weights.must_be_alone or not self._weights.has_arrived()):
            self._resume(self._stopped.popleft())
        self._left[layer] = num_batches
        weights = self._take(layer)
        self._unit_places = id(weights)
        self._skeleton.equip(layer, weights)

    def _take(self, unit: int) -> Mapping[str, Tensor]:
        if not self._weights.has_arrived():
            with self._waiting():
                self._weights.arrive()
        return self._weights.take(unit)

    def _start(self, visit: Visit, batch: _Batch) -> None:
        passage = _Passage(self._compute)
        passage.visit = visit
        passage.switch(passage, batch)
        self._note(passage)

    def _resume(self, passage: _Passage) -> None:
        passage.switch()
        self._note(passage)

    def _note(self, passage: _Passage) -> None:
        """After a passage has run for a while: it has stopped, or it has ended."""
        if not passage.dead:
            self._stopped.append(passage)
            return
        layer = passage.visit.layer
        self._left[layer] -= 1
        if not self._left[layer]:
            self._skeleton.strip(layer)
            self._weights.release()

    def _finish_until_free(self, visit: Visit) -> None:
        """Passages end in the order in which they began; stop when none of this batch is under way, and its
        rows have room."""
        while self._stopped and not self._is_free(visit):
            self._resume(self._stopped.popleft())

    def _is_free(self, visit: Visit) -> bool:
        is_under_way = any(passage.visit.batch == visit.batch for passage in self._stopped)
        return not is_under_way and (self._cache is None or self._cache.has_room_for(*visit))

    def _finish_all(self) -> None:
        while self._stopped:
            self._resume(self._stopped.popleft())

    def _abandon(self) -> None:
        """Leave nothing half done behind an error."""
        for passage in self._stopped:
            passage.throw()
        self._stopped.clear()
        for layer in [layer for layer, left in self._left.items() if left]:
            self._skeleton.strip(layer)
        self._left.clear()

    def _front(self, work: BatchWork, tokens_of: TokensOf) -> _Batch:
        hidden = self._activations.blank(work.batch)
        starts_here = self._exchange is None or self._exchange.has_front
        calls, start = [], 0
        for chunk in work.chunks:
            tokens = torch.tensor([token for each in chunk.works for token in tokens_of(each)])
            positions = torch.cat([torch.arange(each.start, each.end) for each in chunk.works])
            rows = self._weights.rows(tokens, self._ledger) if starts_here else self._no_rows(len(tokens))
            output = self._skeleton.front(rows, positions.to(self._device), self._weights.rest)
            if starts_here:
                hidden[start : start + chunk.num_tokens] = output.hidden[0]
            calls.append(output.calls if chunk.is_prefill else self._standing_calls(work.batch, output.calls))
            start += chunk.num_tokens
        if self._exchange is not None and not starts_here:
            self._exchange.receive(hidden)
        self._activations.put(work.batch, hidden)
        return _Batch(work, calls)

    def _no_rows(self, count: int) -> Tensor:
        """In place of the input embedding's rows, for a front that is run for the layers' arguments alone."""
        width = self._skeleton.embedding_width
        return torch.zeros((), dtype=self._skeleton.compute_dtype, device=self._device).expand(count, width)

    def _standing_calls(self, batch: int, calls: list[LayerCall]) -> list[LayerCall]:
        """The arguments of a decoding batch, at the places where earlier sweeps had them if they can be."""
        if self._new_tapes is None:
            return calls
        assert self._cache is not None
        decoding = self._cache.decoding(batch)
        standing = self._standings.get(decoding)
        if standing is None or not standing.follows(calls):
            if batch not in self._tapes_of:
                self._tapes_of[batch] = self._new_tapes()
            standing = self._standings[decoding] = Standing(calls, self._tapes_of[batch])
        return standing.calls

    def _compute(self, passage: _Passage, batch: _Batch) -> None:
        visit = passage.visit
        hidden = self._activations.take(visit.batch)
        for passage.chunk, calls, run in batch.runs():
            passage.recording = passage.standing = None
            if passage.chunk.is_prefill:
                self._step(passage, hidden[run], calls[visit.layer])
                continue
            assert self._cache is not None
            self._cache.clear_desk(visit.batch)
            passage.standing = self._standings.get(self._cache.decoding(visit.batch))
            if passage.standing is None:
                self._step(passage, hidden[run], calls[visit.layer])
            else:
                self._standing_step(passage, passage.standing, hidden[run], calls[visit.layer])
        self._activations.put(visit.batch, hidden)

    def _step(self, passage: _Passage, hidden: Tensor, call: LayerCall) -> None:
        hidden.copy_(self._skeleton.layer(passage.visit.layer, hidden[None], call)[0])

    def _standing_step(self, passage: _Passage, standing: Standing, hidden: Tensor, call: LayerCall) -> None:
        """A decode step: done for the first time, recorded the second time, replayed from then on."""
        key = (passage.visit.layer, hidden.data_ptr(), self._unit_places)
        recording = standing.recording(key)
        if recording is not None:
            passage.recording = recording
            recording.replay(passage)
            return
        if self._new_tapes is None or not standing.is_known(key):
            self._step(passage, hidden, call)
            return
        passage.recording = recording = Recording(standing.new_tape)
        try:
            recording.begin()
            self._step(passage, hidden, call)
            recording.end()
        except BaseException as error:
            was_open = recording.is_open
            recording.abandon()
            if not was_open or not isinstance(error, RuntimeError):
                raise
            # The hidden states are still those of before, and rows that are appended again are the same.
            logger.info("This model's layers cannot be recorded (%s); they run as they are.", error)
            self._new_tapes = passage.recording = passage.standing = None
            self._standings.clear()
            self._step(passage, hidden, call)
        else:
            standing.keep(key, recording)

    def _back(
        self, batch: _Batch, hidden: Tensor, head: Tensor, positions_of: PositionsOf, on_logits: OnLogits
    ) -> None:
        wanted = picks_of(batch.work, positions_of)
        for first in range(0, len(wanted), self._logit_rows):
            some = wanted[first : first + self._logit_rows]
            index = torch.tensor([row for _, row in some], device=self._device)
            logits = self._skeleton.back(hidden[index][None], self._weights.rest, head)
            on_logits([pick for pick, _ in some], logits)

    # --- attention, called from inside transformers' layers ----------------------------------------------

    def _attend(self, _: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        passage = getcurrent()
        assert isinstance(passage, _Passage)
        # (1, heads, tokens, size) -> (tokens, heads, size)
        query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
        attend = self._prefill if passage.chunk.is_prefill else self._decode
        return attend(passage, query, key, value)[None]

    def _prefill(self, passage: _Passage, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        visit, chunk = passage.visit, passage.chunk
        geometry = self._anatomy.layers[visit.layer].geometry
        if self._cache is not None:
            rows = self._cache.encode(visit.layer, key, value)
            self._cache.append(visit.layer, visit.batch, chunk, rows)
        output = query.new_empty(query.shape[0], geometry.num_query_heads, geometry.value_size)
        before = self._cache.prefix(visit.layer, chunk) if self._cache is not None else None
        for _, run in chunk.runs():
            keys, values = key[run], value[run]
            if before is not None:
                keys, values = torch.cat((before[0], keys)), torch.cat((before[1], values))
            output[run] = prefill_attention(query[run], keys, values, geometry)
        return output

    def _decode(self, passage: _Passage, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert self._cache is not None
        layer, batch = passage.visit
        rows = self._cache.encode(layer, key, value)
        if self._cache.rests_on_device(layer):
            self._cache.append(layer, batch, passage.chunk, rows)
            return self._cache.attend_on_device(layer, batch, query, rows)
        query = query.contiguous()
        if self._cache.is_attended_on_host(layer, batch):
            self._cache.leave(layer, batch, rows, query)
            self._aside(passage, self._attend_on_host)
            return self._cache.collect(layer, batch)
        value_size = self._anatomy.layers[layer].geometry.value_size
        cut = Cut(query, rows, query.new_empty(*query.shape[:-1], value_size))
        if passage.standing is not None:
            cut = passage.standing.places(query, rows, value_size)
            cut.query.copy_(query)
            cut.rows.copy_(rows)
        self._cache.leave(layer, batch, rows, None)
        self._aside(passage, partial(self._attend_brought, cut=cut))
        return cut.attended

    def _aside(self, passage: _Passage, step: Callable[[_Passage], None]) -> None:
        """Do a step of a visit that is no part of what is recorded of it."""
        if passage.recording is None:
            step(passage)
        else:
            passage.recording.aside(step, passage)

    def _attend_on_host(self, passage: _Passage) -> None:
        """The host attends rows where they rest; meanwhile other batches go on."""
        assert self._cache is not None
        layer, batch = passage.visit
        self._cache.append_from_desk(layer, batch)
        arrival = self._cache.attend_on_host(layer, batch)
        self._let_others_go_on(passage)
        with self._waiting():
            arrival.wait()
        self._cache.attended(layer, batch)

    def _attend_brought(self, passage: _Passage, *, cut: Cut) -> None:
        """The device attends rows that are brought to it; meanwhile other batches go on."""
        assert self._cache is not None
        layer, batch = passage.visit
        self._cache.append_from_desk(layer, batch)
        self._let_others_go_on(passage)
        with self._waiting():
            self._cache.arrive(layer, batch)
        cut.attended.copy_(self._cache.attend_on_device(layer, batch, cut.query, cut.rows))
        self._cache.attended(layer, batch)

    def _let_others_go_on(self, passage: _Passage) -> None:
        """Stop here until what this passage waits for is next in turn. Where host memory plays the device
        there is one processor for everything, and nothing to gain."""
        if self._overlaps:
            assert passage.parent is not None
            passage.parent.switch()


def _num_tokens(work: BatchWork) -> int:
    return sum(chunk.num_tokens for chunk in work.chunks)
