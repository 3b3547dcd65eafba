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

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from capstan.generation.attention.packed import FUSED_ATTENTION
from capstan.generation.planning.batching import BatchWork, Work
from capstan.generation.planning.resources import DEVICE_COMPUTE
from capstan.generation.runtime.activations import Activations
from capstan.generation.runtime.exchange import Exchange
from capstan.generation.runtime.kv_cache import KeyValueCache
from capstan.generation.runtime.visits import Batch, Passage, Visit, Visits
from capstan.generation.runtime.weights import WeightStore
from capstan.models.layer_profile import ModelProfile
from capstan.models.meta_model import MetaModel
from capstan.transport import Clock, Ledger, Stopwatch, stream_of


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


class BlockSchedule:
    """Runs sweeps. Owns no memory: weights, cache and activations are given to it."""

    def __init__(
        self,
        meta_model: MetaModel,
        profile: ModelProfile,
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
        self._meta_model, self._profile = meta_model, profile
        self._weights, self._activations, self._cache = weights, activations, cache
        self._exchange = exchange  # with the ranks that have the layers before and after
        self._logit_rows, self._device, self._ledger = logit_rows, device, ledger
        self._stopped: deque[Passage] = deque()
        self._left: Counter[int] = Counter()  # batches that have not passed each layer that was begun
        self._stream = stream_of(device, "compute")
        self._clock = Clock(stopwatch, DEVICE_COMPUTE)
        self._visits = Visits(meta_model, profile, activations, cache=cache, device=device, clock=self._clock)

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
        with self._on_stream(), self._clock.running():
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

    def _sweep(
        self,
        works: Sequence[BatchWork],
        tokens_of: TokensOf,
        positions_of: PositionsOf,
        on_logits: OnLogits,
        *,
        is_last: bool,
    ) -> None:
        self._meta_model.attend_with(self._visits.attend)  # each time: another job may have run in between
        visits = zigzag(self._meta_model.num_layers, [work.batch for work in works])
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
        last_unit = self._take(self._meta_model.num_layers)
        for batch in batches.values():
            hidden = self._activations.take(batch.work.batch)
            if self._exchange is None or self._exchange.has_back:
                self._back(batch, hidden, last_unit[self._meta_model.head], positions_of, on_logits)
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
        self._visits.unit_places = id(weights)
        self._meta_model.equip(layer, weights)

    def _take(self, unit: int) -> Mapping[str, Tensor]:
        if not self._weights.has_arrived():
            with self._clock.paused():
                self._weights.arrive()
        return self._weights.take(unit)

    def _start(self, visit: Visit, batch: Batch) -> None:
        passage = Passage(self._visits.compute)
        passage.visit = visit
        passage.switch(passage, batch)
        self._note(passage)

    def _resume(self, passage: Passage) -> None:
        passage.switch()
        self._note(passage)

    def _note(self, passage: Passage) -> None:
        """After a passage has run for a while: it has stopped, or it has ended."""
        if not passage.dead:
            self._stopped.append(passage)
            return
        layer = passage.visit.layer
        self._left[layer] -= 1
        if not self._left[layer]:
            self._meta_model.strip(layer)
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
            self._meta_model.strip(layer)
        self._left.clear()

    def _front(self, work: BatchWork, tokens_of: TokensOf) -> Batch:
        hidden = self._activations.blank(work.batch)
        starts_here = self._exchange is None or self._exchange.has_front
        calls, start = [], 0
        for chunk in work.chunks:
            tokens = torch.tensor([token for each in chunk.works for token in tokens_of(each)])
            positions = torch.cat([torch.arange(each.start, each.end) for each in chunk.works])
            rows = self._weights.rows(tokens, self._ledger) if starts_here else self._no_rows(len(tokens))
            output = self._meta_model.front(rows, positions.to(self._device), self._weights.rest)
            if starts_here:
                hidden[start : start + chunk.num_tokens] = output.hidden[0]
            calls.append(self._visits.calls_of(work.batch, chunk, output.calls))
            start += chunk.num_tokens
        if self._exchange is not None and not starts_here:
            self._exchange.receive(hidden)
        self._activations.put(work.batch, hidden)
        return Batch(work, calls)

    def _no_rows(self, count: int) -> Tensor:
        """In place of the input embedding's rows, for a front that is run for the layers' arguments alone."""
        width = self._meta_model.embedding_width
        return torch.zeros((), dtype=self._meta_model.compute_dtype, device=self._device).expand(count, width)

    def _back(
        self, batch: Batch, hidden: Tensor, head: Tensor, positions_of: PositionsOf, on_logits: OnLogits
    ) -> None:
        wanted = picks_of(batch.work, positions_of)
        for first in range(0, len(wanted), self._logit_rows):
            some = wanted[first : first + self._logit_rows]
            index = torch.tensor([row for _, row in some], device=self._device)
            logits = self._meta_model.back(hidden[index][None], self._weights.rest, head)
            on_logits([pick for pick, _ in some], logits)


def _num_tokens(work: BatchWork) -> int:
    return sum(chunk.num_tokens for chunk in work.chunks)
