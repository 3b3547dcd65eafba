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

import torch
from torch import Tensor

from capstan.generation.attention.decoding import Decoding, Form, form_of
from capstan.generation.attention.host_attention import Seats, attend_on_host
from capstan.generation.attention.row_format import RowFormat
from capstan.generation.planning.batching import BatchWork, BlockShape, Chunk, Work
from capstan.generation.planning.cache_buffers import (
    RING_SLOTS,
    ROWS_IN_FLIGHT,
    Lanes,
    cache_buffers,
    desk_sizes,
    host_bytes,
    prefix_bytes,
    region_bytes,
    region_rows,
)
from capstan.generation.planning.placement import Placement
from capstan.generation.planning.resources import (
    DEVICE_TO_HOST,
    DISK_TO_HOST,
    HOST_ATTENTION,
    HOST_TO_DEVICE,
    HOST_TO_DISK,
)
from capstan.generation.runtime.cache_regions import Regions
from capstan.generation.runtime.desks import Desk, Fetch, Places, shaped
from capstan.storage import DiskSlab, Slab, SlabKeeper
from capstan.transport import Ledger, Stopwatch, Ticket, cross

# So many forms of its decode chunks are remembered of each batch: with refilled slots they come again.
_KNOWN_FORMS = 4


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
        self._desks = [
            Desk.of(
                desk_sizes(formats, placement, batch.slots),
                host=self._host_slab,
                device=self._device_slab if index in self._host_batches else None,
            )
            for index, batch in enumerate(shape.batches)
        ]
        self._clearing: dict[int, Ticket] = {}  # when the rows on a desk have been put where they rest
        self._stored: dict[tuple[int, int], Ticket] = {}
        self._leaving: deque[Ticket] = deque()
        self._decoding: dict[int, Decoding] = {}
        self._known: dict[int, dict[Form, Decoding]] = {}
        self._to_fetch: deque[tuple[int, int]] = deque()
        self._fetches: dict[tuple[int, int], Fetch] = {}
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

    def decoding(self, batch: int) -> Decoding:
        """The sequences of a batch that decode in this sweep; the same value for chunks of the same form."""
        return self._decoding[batch]

    def begin(self, works: Sequence[BatchWork]) -> None:
        """Start a sweep: the rows that it will read begin to arrive, in the order of the schedule."""
        self._decoding = {
            work.batch: self._decoding_of(work.batch, chunk)
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

    def _decoding_of(self, batch: int, chunk: Chunk) -> Decoding:
        known, form = self._known.setdefault(batch, {}), form_of(chunk)
        if form in known:
            known[form].follow(chunk)
        else:
            if len(known) == _KNOWN_FORMS:
                del known[next(iter(known))]
            known[form] = Decoding.of(chunk, self._device)
        return known[form]

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
        self._fetches[layer, batch] = Fetch(ticket, target)

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

    def arrive(self, layer: int, batch: int) -> None:
        """Wait for the rows of a visit that are brought to the device."""
        self._fetches[layer, batch].ticket.wait()

    def attend_on_device(self, layer: int, batch: int, query: Tensor, new_rows: Tensor) -> Tensor:
        """Attend the decoding sequences of a batch on the device, the new tokens' rows `[sequences, row
        bytes]`, already appended, among theirs.

        query: `[sequences, heads, size]`. Returns `[sequences, heads, value size]`.
        """
        decoding, layout = self._decoding[batch], self._formats[layer]
        if (layer, batch) not in self._fetches:
            return decoding.attend_resting(query, self._regions.rows(layer, batch), layout)
        fetch = self._fetches.pop((layer, batch))
        fetch.target[torch.arange(len(new_rows), device=self._device), decoding.starts] = new_rows
        return decoding.attend_brought(query, fetch.target, layout)

    def prefix(self, layer: int, chunk: Chunk) -> tuple[Tensor, Tensor] | None:
        """Keys and values `[prefix, key heads, size]` that prompts of this chunk follow, if any."""
        if not self._shape.prefix or chunk.works[0].is_prefix:
            return None
        layout, rows = self._formats[layer], self._regions.prefixes[layer]
        if self._tiers[layer] != "device":
            lane, home = self._lanes.rows_in, rows
            rows = arrived = shaped(self._prefix_slot, torch.uint8, tuple(home.shape))
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

    def attend_on_host(self, layer: int, batch: int) -> Ticket:
        """Attend a batch's queries on its desk where its rows rest, the new rows on the desk among them."""
        layout, decoding, desk = self._formats[layer], self._decoding[batch], self._desk(layer, batch)
        fetch = self._fetches.pop((layer, batch), None)
        rows = self._regions.rows(layer, batch) if fetch is None else fetch.target
        seats = decoding.seats
        if fetch is not None:
            seats = Seats.of(list(range(len(decoding.ends))), decoding.ends)
        for tensor, link in (
            (desk.queries, DEVICE_TO_HOST),
            (desk.result, HOST_TO_DEVICE),
        ):
            self._ledger.count(link, "activations", tensor.numel() * tensor.element_size())
        if fetch is None:  # else on their way to disk
            self._ledger.count(DEVICE_TO_HOST, "cache", desk.rows.numel())

        def attend() -> None:
            self._lanes.attention.synchronize()  # the desk has been filled
            with Stopwatch(self._ledger, torch.device("cpu")).time(HOST_ATTENTION):
                attend_on_host(
                    desk.queries,
                    rows,
                    layout,
                    seats,
                    out=desk.found,
                    prefix=self._regions.prefixes[layer] if self._shape.prefix else None,
                    new_rows=desk.rows,
                    threads=self._host_threads,
                )

        return self._lanes.attention.submit(attend, after=[fetch.ticket] if fetch else [])

    def collect(self, layer: int, batch: int) -> Tensor:
        """What host attention found crosses from the desk: `[sequences, heads, value size]`."""
        desk = self._desk(layer, batch)
        cross(desk.result, desk.found)
        return desk.result

    def leave(self, layer: int, batch: int, rows: Tensor, query: Tensor | None) -> None:
        """New rows `[sequences, row bytes]` cross to the batch's desk, which must be clear; so do queries
        `[sequences, heads, size]` for the host."""
        desk = self._desk(layer, batch)
        cross(desk.rows, rows)
        if query is not None:
            cross(desk.queries, query)

    def clear_desk(self, batch: int) -> None:
        """Wait until the rows on a batch's desk are where they rest."""
        ticket = self._clearing.pop(batch, None)
        if ticket is not None:
            ticket.wait_on_host()

    def append_from_desk(self, layer: int, batch: int) -> None:
        """Put the rows on a desk where they rest, unless host attention does."""
        if self._tiers[layer] == "host" and batch in self._host_batches:
            return
        chunk, rows = self._decoding[batch].chunk, self._desk(layer, batch).rows
        self._ledger.count(DEVICE_TO_HOST, "cache", rows.numel())

        def put() -> None:
            self._lanes.rows_out.synchronize()
            if self._tiers[layer] == "disk":
                self._write_disk(layer, batch, chunk, rows)
                return
            region = self._regions.rows(layer, batch)
            for work, run in chunk.runs():
                region[work.slot, self._regions.own(work)] = rows[run]

        self._stored[layer, batch] = self._clearing[batch] = self._lanes.rows_out.submit(put)

    def _desk(self, layer: int, batch: int) -> Places:
        return self._desks[batch].places(self._formats[layer], len(self._decoding[batch].ends))

    # --- writing -----------------------------------------------------------------------------------------

    def encode(self, layer: int, key: Tensor, value: Tensor) -> Tensor:
        """New keys and values `[tokens, key heads, size]` as rows `[tokens, row bytes]`."""
        return self._formats[layer].encode(key, value)

    def append(self, layer: int, batch: int, chunk: Chunk, rows: Tensor) -> None:
        """Send the rows of prompts, or of tokens whose rows rest on the device, to their region."""
        if self._tiers[layer] == "device":
            self._put(layer, batch, chunk, rows)
            return
        send = self._send_prefix if chunk.works[0].is_prefix else self._send_prompts
        ticket = self._lanes.rows_out.submit(lambda: send(layer, batch, chunk, rows), uses=[rows])
        self._stored[layer, batch] = ticket
        self._leaving.append(ticket)  # rows stay in device memory until they have been sent
        if len(self._leaving) > ROWS_IN_FLIGHT:
            self._leaving.popleft().wait_on_host()

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
        staging = shaped(self._outgoing, torch.uint8, tuple(rows.shape))
        lane.copy(staging, rows, link=DEVICE_TO_HOST, content="cache")
        lane.synchronize()
        self._write_disk(layer, batch, chunk, staging)

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
        self._ring, self._staging, self._desks = [], [], []
        self._fetches, self._decoding, self._known = {}, {}, {}
        self._device_slab.close()
        self._keeper.give_back(self._host_slab)
