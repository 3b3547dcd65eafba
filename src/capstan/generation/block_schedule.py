"""The zig-zag block schedule: one sweep over the layers computes a step of every batch.

    for each layer:
        for each GPU batch:        next layer's weights, next batch's cache and hidden states on their way in,
            compute                last batch's new keys and values and hidden states on their way out

Weights cross the link once for a whole block instead of once for a batch; that is where throughput comes
from. Waiting is by tickets for what is needed next, never for the whole device.

Source: FlexGen, section 4.1 and algorithm 1, arXiv 2303.06865.
Differs: prompts start and sequences end in any sweep (the paper's blocks start and end together), so there
is no separate prefill pass; nothing is padded; copies are ordered by events, not by a barrier per step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from capstan.generation.activations import Activations
from capstan.generation.anatomy import Anatomy
from capstan.generation.attention import decode_attention, prefill_attention
from capstan.generation.batching import BatchWork, Chunk, Work
from capstan.generation.kv_cache import KeyValueCache
from capstan.generation.skeleton import LayerCall, Skeleton
from capstan.generation.weights import DEVICE_TO_HOST, HOST_TO_DEVICE, WeightStore
from capstan.transport import Ledger, Stopwatch

DEVICE_COMPUTE, HOST_ATTENTION = "device compute", "host attention"


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
        host_attention: bool,
        logit_rows: int,
        device: torch.device,
        ledger: Ledger,
        stopwatch: Stopwatch,
    ) -> None:
        self._skeleton, self._anatomy = skeleton, anatomy
        self._weights, self._activations, self._cache = weights, activations, cache
        self._host_attention, self._logit_rows = host_attention, logit_rows
        self._device, self._ledger, self._stopwatch = device, ledger, stopwatch
        self._now: tuple[Visit, Chunk] | None = None

    @torch.inference_mode()
    def sweep(
        self, works: Sequence[BatchWork], tokens_of: TokensOf, positions_of: PositionsOf, on_logits: OnLogits
    ) -> None:
        """Compute one sweep.

        Args:
            tokens_of: the token ids of a piece of work.
            positions_of: at which positions of it logits are wanted.
            on_logits: gets places and their logits `[places, vocabulary]`, a few rows at a time.
        """
        self._skeleton.attend_with(self._attend)  # each time: another job may have run in between
        visits = zigzag(self._skeleton.num_layers, [work.batch for work in works])
        self._activations.begin({work.batch: _num_tokens(work) for work in works})
        self._weights.prefetch(0)
        batches = {work.batch: self._front(work, tokens_of) for work in works}
        weights: dict[str, Tensor] = {}
        self._prefetch_rows(visits[0], batches)
        self._activations.prefetch(visits[0].batch)
        for visit, following in zip(visits, [*visits[1:], None], strict=True):
            if visit.batch == works[0].batch:
                weights = self._weights.take(visit.layer)
                self._weights.prefetch(visit.layer + 1)
            if following is not None:
                self._prefetch_rows(following, batches)
                if following.batch != visit.batch:
                    self._activations.prefetch(following.batch)
            self._compute(visit, batches[visit.batch], weights)
        head = self._weights.take(self._skeleton.num_layers)[self._skeleton.head]
        for batch in batches.values():
            self._back(batch, head, positions_of, on_logits)

    def _prefetch_rows(self, visit: Visit, batches: dict[int, _Batch]) -> None:
        if self._cache is not None:
            for chunk in batches[visit.batch].work.chunks:
                self._cache.prefetch(visit.layer, visit.batch, chunk)

    def _front(self, work: BatchWork, tokens_of: TokensOf) -> _Batch:
        hidden = self._activations.blank(work.batch)
        calls, start = [], 0
        for chunk in work.chunks:
            tokens = torch.tensor([token for each in chunk.works for token in tokens_of(each)])
            positions = torch.cat([torch.arange(each.start, each.end) for each in chunk.works])
            rows = self._weights.rows(tokens, self._ledger)
            with self._stopwatch.time(DEVICE_COMPUTE):
                output = self._skeleton.front(rows, positions.to(self._device), self._weights.rest)
                hidden[start : start + chunk.num_tokens] = output.hidden[0]
            calls.append(output.calls)
            start += chunk.num_tokens
        self._activations.put(work.batch, hidden)
        return _Batch(work, calls)

    def _compute(self, visit: Visit, batch: _Batch, weights: dict[str, Tensor]) -> None:
        hidden = self._activations.take(visit.batch)
        if self._cache is not None:
            self._cache.arrive(visit.layer, visit.batch)
        for chunk, calls, run in batch.runs():
            self._now = (visit, chunk)
            with self._stopwatch.time(DEVICE_COMPUTE):
                output = self._skeleton.layer(visit.layer, hidden[None, run], calls[visit.layer], weights)
                hidden[run] = output[0]
        self._activations.put(visit.batch, hidden)

    def _back(self, batch: _Batch, head: Tensor, positions_of: PositionsOf, on_logits: OnLogits) -> None:
        picks, rows, start = [], [], 0
        for chunk in batch.work.chunks:
            for work in chunk.works:
                for position in positions_of(work):
                    picks.append(Pick(work.sequence, position))
                    rows.append(start + position - work.start)
                start += work.count
        hidden = self._activations.take(batch.work.batch)
        for first in range(0, len(picks), self._logit_rows):
            some = slice(first, first + self._logit_rows)
            with self._stopwatch.time(DEVICE_COMPUTE):
                index = torch.tensor(rows[some], device=self._device)
                logits = self._skeleton.back(hidden[index][None], self._weights.rest, head)
            on_logits(picks[some], logits)

    # --- attention, called from inside transformers' layers ----------------------------------------------

    def _attend(self, _: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        assert self._now is not None
        visit, chunk = self._now
        # (1, heads, tokens, size) -> (tokens, heads, size)
        query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
        if chunk.is_prefill:
            return self._prefill(visit, chunk, query, key, value)[None]
        return self._decode(visit, chunk, query, key, value)[None]

    def _prefill(self, visit: Visit, chunk: Chunk, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        geometry = self._anatomy.layers[visit.layer].geometry
        if self._cache is not None:
            self._cache.append(visit.layer, visit.batch, chunk, key, value)
        output = query.new_empty(query.shape[0], geometry.num_query_heads, geometry.value_size)
        start = 0
        for work in chunk.works:
            run = slice(start, start + work.count)
            output[run] = prefill_attention(query[run], key[run], value[run], geometry)
            start += work.count
        return output

    def _decode(self, visit: Visit, chunk: Chunk, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert self._cache is not None
        on_host = self._host_attention and not self._cache.rests_on_device(visit.layer)
        new_rows = self._cache.append(visit.layer, visit.batch, chunk, key, value)
        if on_host:
            query, new_rows = self._to_host(query), new_rows.cpu()
        cached = self._cache.rows(visit.layer, visit.batch, chunk, new_rows)
        geometry = self._anatomy.layers[visit.layer].geometry
        ends = [work.end for work in chunk.works]
        if not on_host:
            return _attend_seated(query, cached, ends, geometry)
        with Stopwatch(self._ledger, torch.device("cpu")).time(HOST_ATTENTION):
            output = _attend_seated(query, cached, ends, geometry)
        self._ledger.count(HOST_TO_DEVICE, "activations", output.numel() * output.element_size())
        return output.to(self._device)

    def _to_host(self, query: Tensor) -> Tensor:
        self._ledger.count(DEVICE_TO_HOST, "activations", query.numel() * query.element_size())
        return query.cpu()


def _attend_seated(query: Tensor, cached: Any, ends: list[int], geometry: Any) -> Tensor:
    """Attention of a decode chunk over rows in which its sequences may sit with idle seats between."""
    num_rows = cached.keys.shape[1]
    if cached.seats is None:
        lengths = None if min(ends) == num_rows else torch.tensor(ends, device=query.device)
        return decode_attention(query, cached.keys, cached.values, lengths, geometry)
    seats = torch.tensor(cached.seats, device=query.device)
    seated = query.new_zeros(cached.keys.shape[0], *query.shape[1:])
    seated[seats] = query
    lengths = torch.ones(cached.keys.shape[0], dtype=torch.long, device=query.device)
    lengths[seats] = torch.tensor(ends, device=query.device)
    return decode_attention(seated, cached.keys, cached.values, lengths, geometry)[seats]


def _num_tokens(work: BatchWork) -> int:
    return sum(chunk.num_tokens for chunk in work.chunks)
