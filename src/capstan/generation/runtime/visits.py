"""Visits: one layer computes over one GPU batch, its attention wherever the batch's rows are.

A visit runs in a greenlet of its own, so that it can stop inside its attention, deep in transformers' code,
while the device goes on with other batches. Decode steps are recorded and replayed where the device can.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from capstan.generation.attention.decoding import Decoding
from capstan.generation.attention.packed import prefill_attention
from capstan.generation.planning.batching import BatchWork, Chunk
from capstan.generation.runtime.activations import Activations
from capstan.generation.runtime.kv_cache import KeyValueCache
from capstan.generation.runtime.recording import TAPES, Cut, NewTape, Recording, Standing
from capstan.models.layer_profile import ModelProfile
from capstan.models.meta_model import LayerCall, MetaModel
from capstan.transport import Clock

logger = logging.getLogger(__name__)

# Devices that compute while they wait for rows or for the host.
_OVERLAPPING = ("cuda",)


class Visit(NamedTuple):
    """One layer over one GPU batch."""

    layer: int
    batch: int


@dataclass
class Batch:
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


class Passage(greenlet):
    """A visit under way. It can stop inside its attention, deep in transformers' code, and be resumed."""

    visit: Visit
    chunk: Chunk
    standing: Standing | None  # of the batch that decodes
    recording: Recording | None  # being made
    attended: Callable[[], Tensor] | None  # gives what attention found, once it has been done


class Visits:
    """Computes visits. Owns no memory but what is recorded."""

    def __init__(
        self,
        meta_model: MetaModel,
        profile: ModelProfile,
        activations: Activations,
        *,
        cache: KeyValueCache | None,
        device: torch.device,
        clock: Clock,
    ) -> None:
        self._meta_model, self._profile = meta_model, profile
        self._activations, self._cache, self._clock = activations, cache, clock
        # Hidden states that rest elsewhere have room on the device for two batches only.
        self._overlaps = device.type in _OVERLAPPING and activations.rests_on_device
        # What is recorded finds the hidden states where they always lie.
        self._new_tapes = TAPES.get(device.type) if activations.rests_on_device else None
        self._tapes_of: dict[int, NewTape] = {}
        self._standings: WeakKeyDictionary[Decoding, Standing] = WeakKeyDictionary()
        self.unit_places = 0  # says where the current layer's weights lie

    def calls_of(self, batch: int, chunk: Chunk, calls: list[LayerCall]) -> list[LayerCall]:
        """The layers' arguments for a chunk: those of one that decodes at the places where earlier sweeps had
        them, if they can be."""
        if self._new_tapes is None or chunk.is_prefill:
            return calls
        assert self._cache is not None
        decoding = self._cache.decoding(batch)
        standing = self._standings.get(decoding)
        if standing is None or not standing.follows(calls):
            if batch not in self._tapes_of:
                self._tapes_of[batch] = self._new_tapes()
            standing = self._standings[decoding] = Standing(calls, self._tapes_of[batch])
        return standing.calls

    def compute(self, passage: Passage, batch: Batch) -> None:
        """Pass a batch through a layer. May stop inside."""
        visit = passage.visit
        hidden = self._activations.take(visit.batch)
        for passage.chunk, calls, run in batch.runs():
            passage.recording = passage.standing = passage.attended = None
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

    def _step(self, passage: Passage, hidden: Tensor, call: LayerCall) -> None:
        hidden.copy_(self._meta_model.layer(passage.visit.layer, hidden[None], call)[0])

    def _standing_step(self, passage: Passage, standing: Standing, hidden: Tensor, call: LayerCall) -> None:
        """A decode step: done for the first time, recorded the second time, replayed from then on."""
        key = (passage.visit.layer, hidden.data_ptr(), self.unit_places)
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
            # The hidden states are still those of before. Attention that was done between two stretches stays
            # done (its rows were brought, read and booked once); rows that rest on the device were not yet
            # appended, or are appended again as the same.
            logger.info("This model's layers cannot be recorded (%s); they run as they are.", error)
            self._new_tapes = passage.recording = passage.standing = None
            self._standings.clear()
            self._step(passage, hidden, call)
        else:
            standing.keep(key, recording)

    # --- attention, called from inside transformers' layers ----------------------------------------------

    def attend(self, _: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """What `MetaModel.attend_with` wants."""
        passage = getcurrent()
        assert isinstance(passage, Passage)
        # (1, heads, tokens, size) -> (tokens, heads, size)
        query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
        attend = self._prefill if passage.chunk.is_prefill else self._decode
        return attend(passage, query, key, value)[None]

    def _prefill(self, passage: Passage, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        visit, chunk = passage.visit, passage.chunk
        geometry = self._profile.layers[visit.layer].geometry
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

    def _decode(self, passage: Passage, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert self._cache is not None
        if passage.attended is not None:
            return passage.attended()
        layer, batch = passage.visit
        rows = self._cache.encode(layer, key, value)
        if self._cache.rests_on_device(layer):
            self._cache.append(layer, batch, passage.chunk, rows)
            return self._cache.attend_on_device(layer, batch, query, rows)
        query = query.contiguous()
        if self._cache.is_attended_on_host(layer, batch):
            self._cache.leave(layer, batch, rows, query)
            self._aside(passage, self._attend_on_host)
            passage.attended = partial(self._cache.collect, layer, batch)
            return passage.attended()
        value_size = self._profile.layers[layer].geometry.value_size
        cut = Cut(query, rows, query.new_empty(*query.shape[:-1], value_size))
        if passage.standing is not None:
            cut = passage.standing.places(query, rows, value_size)
            cut.query.copy_(query)
            cut.rows.copy_(rows)
        self._cache.leave(layer, batch, rows, None)
        self._aside(passage, partial(self._attend_brought, cut=cut))
        passage.attended = lambda: cut.attended
        return cut.attended

    def _aside(self, passage: Passage, step: Callable[[Passage], None]) -> None:
        """Do a step of a visit that is no part of what is recorded of it."""
        if passage.recording is None:
            step(passage)
        else:
            passage.recording.aside(step, passage)

    def _attend_on_host(self, passage: Passage) -> None:
        """The host attends rows where they rest; meanwhile other batches go on."""
        assert self._cache is not None
        layer, batch = passage.visit
        self._cache.append_from_desk(layer, batch)
        arrival = self._cache.attend_on_host(layer, batch)
        self._let_others_go_on(passage)
        with self._clock.paused():
            arrival.wait()
        self._cache.attended(layer, batch)

    def _attend_brought(self, passage: Passage, *, cut: Cut) -> None:
        """The device attends rows that are brought to it; meanwhile other batches go on."""
        assert self._cache is not None
        layer, batch = passage.visit
        self._cache.append_from_desk(layer, batch)
        self._let_others_go_on(passage)
        with self._clock.paused():
            self._cache.arrive(layer, batch)
        cut.attended.copy_(self._cache.attend_on_device(layer, batch, cut.query, cut.rows))
        self._cache.attended(layer, batch)

    def _let_others_go_on(self, passage: Passage) -> None:
        """Stop here until what this passage waits for is next in turn. Where host memory plays the device
        there is one processor for everything, and nothing to gain."""
        if self._overlaps:
            assert passage.parent is not None
            passage.parent.switch()
