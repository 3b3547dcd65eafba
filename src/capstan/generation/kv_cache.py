"""The KV cache of a block: every layer's keys and values, on the device, on the host or on disk.

For each layer and GPU batch there is one region `[slots, capacity, row bytes]`. A row is what one token
leaves behind, keys then values, encoded; row = position. So appending a token writes one run of bytes for
each sequence, reading a sequence reads one run, and a region rests in a device slab, a host slab or a
scratch file in the same form. A prefix that all sequences begin with has rows of its own, once for each
layer: regions away from the device begin after it, those on the device with a copy.

Rows that are away from the device are attended in one of two ways, batch by batch: they cross to the device,
through a ring that is filled ahead in the order of the schedule; or the queries cross to the host, where the
rows are read in place while the device goes on with other batches.
"""

from collections import deque
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from capstan.generation.batching import BatchWork, BlockShape, Chunk, Work
from capstan.generation.cache_buffers import (
    RING_SLOTS,
    cache_buffers,
    desk_sizes,
    host_bytes,
    prefix_bytes,
    region_bytes,
    region_rows,
)
from capstan.generation.cache_regions import Regions
from capstan.generation.decoding import Decoding
from capstan.generation.host_attention import Seats, attend_on_host
from capstan.generation.placement import Placement
from capstan.generation.row_format import RowFormat
from capstan.generation.weights import DEVICE_TO_HOST, DISK_TO_HOST, HOST_TO_DEVICE, HOST_TO_DISK
from capstan.storage import DiskSlab, Slab, SlabKeeper
from capstan.transport import Lane, Ledger, Stopwatch, Ticket

HOST_ATTENTION = "host attention"

# So many chunks of prompts may wait in device memory for their rows to leave.
ROWS_IN_FLIGHT = 2


class Lanes(NamedTuple):
    """What moves rows to the device and away from it; what attends them on the host and brings results."""

    rows_in: Lane
    rows_out: Lane
    attention: Lane
    results: Lane


class _Desk(NamedTuple):
    """Host memory through which one batch's decoding sequences pass, as `DeskSizes` says."""

    rows: Tensor
    queries: Tensor
    result: Tensor


class _Fetch(NamedTuple):
    """Rows of one batch and layer on their way."""

    ticket: Ticket
    target: Tensor  # (sequences, rows, row bytes)


class KeyValueCache:
    """The cache of one block. Rows move in the background; `Ticket`s order what depends on them."""

    def __init__(
        self,
        formats: tuple[RowFormat, ...],
        placement: Placement,
        shape: BlockShape,
        *,
        tokens: int,
        device: torch.device,
        disk: DiskSlab | None,
        lanes: Lanes,
        ledger: Ledger,
        keeper: SlabKeeper,
    ) -> None:
        self._formats, self._tiers, self._shape = formats, placement.cache, shape
        self._host_batches = placement.host_batches(len(shape.batches))
        self._device, self._disk, self._lanes, self._ledger = device, disk, lanes, ledger
        buffers = cache_buffers(formats, placement, shape, tokens=tokens)
        self._device_slab = Slab(
            "KV cache on the device",
            region_bytes(formats, self._tiers, shape, "device")
            + prefix_bytes(formats, self._tiers, shape, "device")
            + buffers.device_bytes,
            device=device,
        )
        self._keeper = keeper
        self._host_slab = keeper.take(host_bytes(formats, placement, shape, tokens=tokens))
        self._regions = Regions(
            formats, self._tiers, shape, device=self._device_slab, host=self._host_slab, disk=disk
        )
        self._prefix_slot = self._device_slab.take(buffers.prefix_slot_bytes)
        self._ring = [self._device_slab.take(buffers.ring_slot_bytes) for _ in range(RING_SLOTS)]
        self._staging = [self._host_slab.take(buffers.staging_slot_bytes) for _ in range(RING_SLOTS)]
        self._staged: list[torch.cuda.Event | None] = [None] * RING_SLOTS
        self._outgoing = self._host_slab.take(buffers.outgoing_bytes)
        sizes = [desk_sizes(formats, placement, batch.slots) for batch in shape.batches]
        self._desks = [_Desk(*map(self._host_slab.take, each)) for each in sizes]
        self._results = {batch: self._device_slab.take(sizes[batch].result) for batch in self._host_batches}
        self._stored: dict[tuple[int, int], Ticket] = {}
        self._leaving: deque[Ticket] = deque()
        self._decoding: dict[int, Decoding] = {}
        self._to_fetch: deque[tuple[int, int]] = deque()
        self._fetches: dict[tuple[int, int], _Fetch] = {}
        self._num_fetched = 0
        # Beside an accelerator, one processor hands it its work and one moves bytes.
        spare = 2 if device.type == "cuda" else 0
        self._host_threads = max(1, torch.get_num_threads() - spare)

    @property
    def device_bytes(self) -> int:
        return self._device_slab.size_bytes

    @property
    def host_bytes(self) -> int:
        return self._host_slab.size_bytes

    def is_attended_on_host(self, layer: int, batch: int) -> bool:
        """Whether the queries of this visit cross to the host."""
        return self._tiers[layer] != "device" and batch in self._host_batches

    def rests_on_device(self, layer: int) -> bool:
        return self._tiers[layer] == "device"

    # --- a sweep -----------------------------------------------------------------------------------------

    def begin(self, works: Sequence[BatchWork]) -> None:
        """Start a sweep: the rows that it will read begin to arrive, in the order of the schedule."""
        self._decoding = {
            work.batch: Decoding.of(chunk, self._device)
            for work in works
            for chunk in work.chunks
            if not chunk.is_prefill
        }
        self._fetches = {}
        self._to_fetch = deque(
            (layer, batch)
            for layer in range(len(self._tiers))
            for batch in self._decoding
            if self._is_brought(layer, batch)
        )
        for _ in range(RING_SLOTS):
            self._fetch_next()

    # --- reading -----------------------------------------------------------------------------------------

    def _fetch_next(self) -> None:
        """Start bringing the next rows to where they will be read; their slot of the ring is free."""
        if not self._to_fetch:
            return
        layer, batch = self._to_fetch.popleft()
        slot = self._num_fetched % RING_SLOTS
        self._num_fetched += 1
        works, width = self._decoding[batch].chunk.works, self._formats[layer].row_bytes
        # The last row of each sequence is the new token's, written when it is known.
        stays = batch in self._host_batches
        shape = (len(works), self._decoding[batch].num_rows - (self._shape.prefix if stays else 0), width)
        place = self._staging if stays else self._ring
        target = place[slot][: shape[0] * shape[1] * shape[2]].view(shape)
        stored = self._stored.get((layer, batch))
        ticket = self._lanes.rows_in.submit(
            lambda: self._bring(layer, batch, works, slot, target), after=[stored] if stored else []
        )
        self._fetches[layer, batch] = _Fetch(ticket, target)

    def _bring(self, layer: int, batch: int, works: Sequence[Work], slot: int, target: Tensor) -> None:
        lane, width = self._lanes.rows_in, self._formats[layer].row_bytes
        free = self._staged[slot]
        if free is not None:
            free.synchronize()
        prefix, stays = self._shape.prefix, batch in self._host_batches
        # Rows beyond a sequence's end are masked, but a NaN among them would survive the mask.
        target[:, min(work.start for work in works) - (prefix if stays else 0) :].zero_()
        sources = [self._source(layer, batch, work, slot, target[index]) for index, work in enumerate(works)]
        if stays:
            return
        with lane.stopwatch.time(HOST_TO_DEVICE):
            if prefix:
                target[0, :prefix].copy_(self._regions.prefixes[layer], non_blocking=True)
                target[1:, :prefix] = target[:1, :prefix]
            for index, (work, source) in enumerate(zip(works, sources, strict=True)):
                target[index, prefix : work.start].view(-1).copy_(source, non_blocking=True)
        num_rows = prefix + sum(work.start - prefix for work in works)
        self._ledger.count(HOST_TO_DEVICE, "cache", num_rows * width)
        self._staged[slot] = lane.fence()

    def _source(self, layer: int, batch: int, work: Work, slot: int, target: Tensor) -> Tensor:
        """A sequence's rows after the prefix on the host, flat; read from disk if they rest there."""
        width, num_rows = self._formats[layer].row_bytes, work.start - self._shape.prefix
        size = num_rows * width
        if self._tiers[layer] == "host":
            return self._regions.rows(layer, batch)[work.slot, :num_rows].view(-1)
        source = target[:num_rows].view(-1)
        if batch not in self._host_batches:
            start = work.slot * region_rows(self._shape, batch, "disk") * width
            source = self._staging[slot][start : start + size]
        assert self._disk is not None
        with self._lanes.rows_in.booking(DISK_TO_HOST, "cache", size):
            self._disk.read(self._regions.disk_offset(layer, batch, work), source)
        return source

    def attend_on_device(self, layer: int, batch: int, query: Tensor, new_rows: Tensor) -> Tensor:
        """Attend the decoding sequences of a batch on the device, the new tokens' rows `[sequences, row
        bytes]`, already appended, among theirs.

        query: `[sequences, heads, size]`. Returns `[sequences, heads, value size]`.
        """
        rows, seats = self._rows_on_device(layer, batch, new_rows)
        return self._decoding[batch].attend(query, rows, seats, self._formats[layer])

    def _rows_on_device(self, layer: int, batch: int, new_rows: Tensor) -> tuple[Tensor, Seats]:
        """`[slots, rows, row bytes]`, and who sits where in them."""
        decoding = self._decoding[batch]
        if (layer, batch) not in self._fetches:
            return self._regions.rows(layer, batch), decoding.seats
        fetch = self._fetches.pop((layer, batch))
        fetch.ticket.wait()
        order = range(len(decoding.ends))
        fetch.target[torch.arange(len(order), device=self._device), decoding.starts] = new_rows
        return fetch.target, Seats.of(list(order), decoding.ends)

    def prefix(self, layer: int, chunk: Chunk) -> tuple[Tensor, Tensor] | None:
        """Keys and values `[prefix, key heads, size]` that prompts of this chunk follow, if any."""
        if not self._shape.prefix or chunk.works[0].is_prefix:
            return None
        layout, rows = self._formats[layer], self._regions.prefixes[layer]
        if self._tiers[layer] != "device":
            lane, home = self._lanes.rows_in, rows
            rows = arrived = _shaped(self._prefix_slot, torch.uint8, tuple(home.shape))
            lane.submit(lambda: lane.copy(arrived, home, link=HOST_TO_DEVICE, content="cache")).wait()
        keys, values = layout.decode(rows[None])
        return keys[0], values[0]

    def attended(self, layer: int, batch: int) -> None:
        """The rows of a visit have been read: if they were brought, their slot is for the next to come."""
        if self._is_brought(layer, batch):
            self._fetch_next()

    def _is_brought(self, layer: int, batch: int) -> bool:
        """Whether a visit's rows are read elsewhere than where they rest."""
        tier = self._tiers[layer]
        return tier == "disk" or (tier == "host" and batch not in self._host_batches)

    # --- attention on the host ---------------------------------------------------------------------------

    def has_room_for(self, layer: int, batch: int) -> bool:
        """Whether a visit may begin: rows that the host reads elsewhere than where they rest must have their
        slot of the ring, since its attention is submitted before earlier visits have ended."""
        is_decoded_there = batch in self._decoding and self.is_attended_on_host(layer, batch)
        brought = is_decoded_there and self._is_brought(layer, batch)
        return not brought or (layer, batch) in self._fetches

    def attend_on_host(
        self, layer: int, batch: int, query: Tensor, new_rows: Tensor
    ) -> tuple[Ticket, Tensor]:
        """Attend the decoding sequences of a batch where their rows rest, the new tokens' rows among them.

        query: `[sequences, heads, size]` on the device. Returns what says that the result is there, and the
        result, `[sequences, heads, value size]` on the device.
        """
        layout, decoding = self._formats[layer], self._decoding[batch]
        geometry, count = layout.geometry, len(decoding.ends)
        desk = self._desks[batch]
        queries = _shaped(desk.queries, query.dtype, (count, geometry.num_query_heads, geometry.key_size))
        shape = (count, geometry.num_query_heads, geometry.value_size)
        found = _shaped(desk.result, query.dtype, shape)
        result = _shaped(self._results[batch], query.dtype, shape)
        fetch = self._fetches.pop((layer, batch), None)
        rows = self._regions.rows(layer, batch) if fetch is None else fetch.target
        seats = decoding.seats if fetch is None else Seats.of(list(range(count)), decoding.ends)
        fresh = _shaped(desk.rows, torch.uint8, (count, layout.row_bytes))
        lanes = self._lanes

        def send() -> None:
            lanes.rows_out.copy(queries, query, link=DEVICE_TO_HOST, content="activations")
            if fetch is None:  # else they pass through the desk on their way to disk
                lanes.rows_out.copy(fresh, new_rows, link=DEVICE_TO_HOST, content="cache")
            lanes.rows_out.synchronize()

        def attend() -> None:
            with Stopwatch(self._ledger, torch.device("cpu")).time(HOST_ATTENTION):
                attend_on_host(
                    queries,
                    rows,
                    layout,
                    seats,
                    out=found,
                    prefix=self._regions.prefixes[layer] if self._shape.prefix else None,
                    new_rows=fresh,
                    threads=self._host_threads,
                )

        def bring() -> None:
            lanes.results.copy(result, found, link=HOST_TO_DEVICE, content="activations")

        sent = lanes.rows_out.submit(send, uses=[query, new_rows])
        attended = lanes.attention.submit(attend, after=[sent, *([fetch.ticket] if fetch else [])])
        return lanes.results.submit(bring, after=[attended]), result

    # --- writing -----------------------------------------------------------------------------------------

    def append(self, layer: int, batch: int, chunk: Chunk, key: Tensor, value: Tensor) -> Tensor:
        """Encode a chunk's new keys and values `[tokens, key heads, size]` and send them to their region.

        Returns the encoded rows `[tokens, row bytes]`, on the device. New rows that host attention reads in
        host memory go there with its queries.
        """
        rows = self._formats[layer].encode(key, value)
        if not chunk.is_prefill and self._tiers[layer] == "host" and batch in self._host_batches:
            return rows
        if self._tiers[layer] == "device":
            self._put(layer, batch, chunk, rows)
            return rows
        send = self._send_prompts if chunk.is_prefill else self._send_tokens
        if chunk.works[0].is_prefix:
            send = self._send_prefix
        ticket = self._lanes.rows_out.submit(lambda: send(layer, batch, chunk, rows), uses=[rows])
        self._stored[layer, batch] = ticket
        if chunk.is_prefill:  # rows stay in device memory until they have been sent
            self._leaving.append(ticket)
            if len(self._leaving) > ROWS_IN_FLIGHT:
                self._leaving.popleft().wait_on_host()
        return rows

    def _put(self, layer: int, batch: int, chunk: Chunk, rows: Tensor) -> None:
        """Put a chunk's rows into their region on the device, prompts' after a copy of the prefix."""
        region, prefix = self._regions.rows(layer, batch), self._regions.prefixes[layer]
        if not chunk.is_prefill:
            decoding = self._decoding[batch]
            region[decoding.slots, decoding.starts] = rows
        elif chunk.works[0].is_prefix:
            prefix.copy_(rows)
        else:
            for work, run in chunk.runs():
                region[work.slot, : len(prefix)] = prefix
                region[work.slot, work.start : work.end] = rows[run]

    def _send_prefix(self, layer: int, batch: int, chunk: Chunk, rows: Tensor) -> None:
        self._lanes.rows_out.copy(self._regions.prefixes[layer], rows, link=DEVICE_TO_HOST, content="cache")

    def _send_prompts(self, layer: int, batch: int, chunk: Chunk, rows: Tensor) -> None:
        """A prompt's rows lie side by side in its slot."""
        lane = self._lanes.rows_out
        if self._tiers[layer] == "host":
            region = self._regions.rows(layer, batch)
            with lane.stopwatch.time(DEVICE_TO_HOST):
                for work, run in chunk.runs():
                    region[work.slot, self._regions.own(work)].copy_(rows[run], non_blocking=True)
            self._ledger.count(DEVICE_TO_HOST, "cache", rows.numel())
            return
        staging = _shaped(self._outgoing, torch.uint8, tuple(rows.shape))
        lane.copy(staging, rows, link=DEVICE_TO_HOST, content="cache")
        lane.synchronize()
        self._write_disk(layer, batch, chunk, staging)

    def _send_tokens(self, layer: int, batch: int, chunk: Chunk, rows: Tensor) -> None:
        """One row for each sequence, by way of its batch's desk."""
        lane = self._lanes.rows_out
        staging = _shaped(self._desks[batch].rows, torch.uint8, tuple(rows.shape))
        lane.copy(staging, rows, link=DEVICE_TO_HOST, content="cache")
        lane.synchronize()
        if self._tiers[layer] == "disk":
            self._write_disk(layer, batch, chunk, staging)
            return
        region = self._regions.rows(layer, batch)
        for work, run in chunk.runs():
            region[work.slot, self._regions.own(work)] = staging[run]

    def _write_disk(self, layer: int, batch: int, chunk: Chunk, rows: Tensor) -> None:
        assert self._disk is not None
        width = self._formats[layer].row_bytes
        with self._lanes.rows_out.booking(HOST_TO_DISK, "cache", rows.numel()):
            for work, run in chunk.runs():
                offset = self._regions.disk_offset(layer, batch, work) + self._regions.own(work).start * width
                self._disk.write(offset, rows[run].view(-1))

    def close(self) -> None:
        """Give the memory back; the lanes must be idle."""
        self._regions.forget()
        self._ring, self._staging, self._desks, self._results = [], [], [], {}
        self._fetches, self._decoding = {}, {}
        self._device_slab.close()
        self._keeper.give_back(self._host_slab)


def _shaped(run: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The beginning of flat uint8 memory, seen as a tensor."""
    return run[: prod(shape) * dtype.itemsize].view(dtype).view(shape)
