"""The KV cache of a block: every layer's keys and values, on the device, on the host or on disk.

For each layer and GPU batch there is one region `[slots, capacity, row bytes]`. A row is what one token
leaves behind, keys then values, encoded; row = position. So appending a token writes one run of bytes for
each sequence, reading a sequence reads one run, and a region rests in a device slab, a host slab or a
scratch file in the same form.
"""

from collections import Counter, deque
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from capstan.codecs import Codec, Identity
from capstan.generation.attention import AttentionGeometry
from capstan.generation.batching import BlockShape, Chunk, Work
from capstan.generation.inventory import decoding_scratch_bytes
from capstan.generation.placement import Tier
from capstan.generation.weights import DEVICE_TO_HOST, DISK_TO_HOST, HOST_TO_DEVICE, HOST_TO_DISK
from capstan.storage import DiskSlab, Slab
from capstan.storage.slab import aligned
from capstan.transport import Lane, Ticket

# So many chunks' new rows may wait in device memory for their way out.
ROWS_IN_FLIGHT = 2


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How one token's keys and values of one layer become bytes."""

    geometry: AttentionGeometry
    codec: Codec
    dtype: torch.dtype
    device_type: str

    @property
    def _key_shape(self) -> tuple[int, int]:
        return (self.geometry.num_key_heads, self.geometry.key_size)

    @property
    def _value_shape(self) -> tuple[int, int]:
        return (self.geometry.num_key_heads, self.geometry.value_size)

    @cached_property
    def key_bytes(self) -> int:
        return self.codec.encoded_bytes((1, *self._key_shape), self.dtype)

    @cached_property
    def row_bytes(self) -> int:
        return self.key_bytes + self.codec.encoded_bytes((1, *self._value_shape), self.dtype)

    @property
    def is_plain(self) -> bool:
        return isinstance(self.codec, Identity)

    def decoded_bytes(self, num_rows: int) -> int:
        """Bytes that reading `num_rows` rows takes apart from the rows: decoded keys and values, the
        payloads cut out for decoding, and the codec's own scratch."""
        if self.is_plain:
            return 0
        decoded = num_rows * self.geometry.cached_elements * self.dtype.itemsize
        scratch = max(
            decoding_scratch_bytes(
                self.codec, (num_rows, *shape), self.dtype, self.dtype, device_type=self.device_type
            )
            for shape in (self._key_shape, self._value_shape)
        )
        return decoded + num_rows * self.row_bytes + scratch

    def encode(self, key: Tensor, value: Tensor) -> Tensor:
        """key `[tokens, key heads, size]`, value alike → rows `[tokens, row bytes]`."""
        count = key.shape[0]
        parts = [self.codec.encode(part).payload.view(count, -1) for part in (key, value)]
        return torch.cat(parts, dim=1)

    def decode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows `[sequences, rows, row bytes]` → keys and values `[sequences, rows, key heads, size]`."""
        if self.is_plain:
            values = rows.view(self.dtype)
            split = self.key_bytes // self.dtype.itemsize
            keys, values = values[..., :split], values[..., split:]
            return keys.unflatten(-1, self._key_shape), values.unflatten(-1, self._value_shape)
        keys, values = rows[..., : self.key_bytes], rows[..., self.key_bytes :]
        return self._decode(keys, self._key_shape), self._decode(values, self._value_shape)

    def _decode(self, payload: Tensor, shape: tuple[int, int]) -> Tensor:
        full = (*payload.shape[:2], *shape)
        out = torch.empty(full, dtype=self.dtype, device=payload.device)
        self.codec.decode_into(payload.reshape(-1), full, self.dtype, out)
        return out


class CacheBuffers(NamedTuple):
    """Sizes of what a block's cache needs beside its regions."""

    device_slot_bytes: int
    host_slot_bytes: int
    outgoing_bytes: int

    @property
    def device_bytes(self) -> int:
        return 2 * self.device_slot_bytes

    @property
    def host_bytes(self) -> int:
        return 2 * self.host_slot_bytes + self.outgoing_bytes


def region_bytes(
    formats: tuple[RowFormat, ...], tiers: tuple[Tier, ...], shape: BlockShape, tier: Tier
) -> int:
    """Bytes of all regions that rest on `tier`."""
    rows = [batch.slots * batch.capacity for batch in shape.batches]
    widths = Counter(layout.row_bytes for layout, where in zip(formats, tiers, strict=True) if where == tier)
    return sum(layers * aligned(count * row_bytes) for row_bytes, layers in widths.items() for count in rows)


def cache_buffers(
    formats: tuple[RowFormat, ...],
    tiers: tuple[Tier, ...],
    shape: BlockShape,
    *,
    tokens: int,
    host_attention: bool,
) -> CacheBuffers:
    """The ring buffers that bring rows to the device or from disk, and the staging of outgoing rows, of
    which a chunk has at most `tokens`."""
    rows = max(batch.slots * batch.capacity for batch in shape.batches)

    def widest(*where: Tier) -> int:
        pairs = zip(formats, tiers, strict=True)
        return max((layout.row_bytes for layout, tier in pairs if tier in where), default=0)

    return CacheBuffers(
        device_slot_bytes=0 if host_attention else aligned(rows * widest("host", "disk")),
        host_slot_bytes=aligned(rows * widest("disk")),
        outgoing_bytes=aligned(tokens * widest("host", "disk")),
    )


class CachedRows(NamedTuple):
    """Keys and values `[sequences, rows, key heads, size]` of a decode chunk.

    `seats[i]` is where the chunk's i-th sequence sits among them; None says that they sit in order.
    """

    keys: Tensor
    values: Tensor
    seats: list[int] | None


class KeyValueCache:
    """The cache of one block. Rows move in the background; `Ticket`s order what depends on them."""

    def __init__(
        self,
        formats: tuple[RowFormat, ...],
        tiers: tuple[Tier, ...],
        shape: BlockShape,
        *,
        tokens: int,
        host_attention: bool,
        device: torch.device,
        disk: DiskSlab | None,
        lane_in: Lane,
        lane_out: Lane,
    ) -> None:
        self._formats, self._tiers, self._shape = formats, tiers, shape
        self._host_attention, self._device, self._disk = host_attention, device, disk
        self._lane_in, self._lane_out = lane_in, lane_out
        buffers = cache_buffers(formats, tiers, shape, tokens=tokens, host_attention=host_attention)
        pinned = device.type == "cuda"
        self._device_slab = Slab(
            "KV cache on the device",
            region_bytes(formats, tiers, shape, "device") + buffers.device_bytes,
            device=device,
        )
        self._host_slab = Slab(
            "KV cache on the host",
            region_bytes(formats, tiers, shape, "host") + buffers.host_bytes,
            device=torch.device("cpu"),
            pinned=pinned,
        )
        self._ring = [self._device_slab.take(buffers.device_slot_bytes) for _ in range(2)]
        self._staging = [self._host_slab.take(buffers.host_slot_bytes) for _ in range(2)]
        self._staged: list[torch.cuda.Event | None] = [None, None]
        self._outgoing = self._host_slab.take(buffers.outgoing_bytes)
        self._regions = {
            (layer, batch): self._region(layer, batch)
            for layer in range(len(formats))
            for batch in range(len(shape.batches))
        }
        self._stored: dict[tuple[int, int], Ticket] = {}
        self._leaving: deque[Ticket] = deque()
        self._fetches = 0
        self._arriving: dict[tuple[int, int], tuple[Ticket, Tensor]] = {}

    @property
    def device_bytes(self) -> int:
        return self._device_slab.size_bytes

    @property
    def host_bytes(self) -> int:
        return self._host_slab.size_bytes

    def _region(self, layer: int, batch: int) -> Tensor | int:
        """A tensor `[slots, capacity, row bytes]`, or the offset in the scratch file."""
        shape, row_bytes = self._shape.batches[batch], self._formats[layer].row_bytes
        size = shape.slots * shape.capacity * row_bytes
        if self._tiers[layer] == "disk":
            assert self._disk is not None, "the planner reserves scratch space for a cache on disk"
            return self._disk.take(size)
        slab = self._device_slab if self._tiers[layer] == "device" else self._host_slab
        return slab.take(size).view(shape.slots, shape.capacity, row_bytes)

    def rests_on_device(self, layer: int) -> bool:
        return self._tiers[layer] == "device"

    # --- reading -----------------------------------------------------------------------------------------

    def prefetch(self, layer: int, batch: int, chunk: Chunk) -> None:
        """Start bringing the rows that a decode chunk will read to where it will read them."""
        tier = self._tiers[layer]
        if chunk.is_prefill or (layer, batch) in self._arriving or tier == "device":
            return
        if self._host_attention and tier == "host":
            return
        slot = self._fetches % 2
        self._fetches += 1
        # (sequences, rows, row bytes); the last row of each is the new token's, written when it is known
        rows = (self._staging if self._host_attention else self._ring)[slot]
        shape = (len(chunk.works), max(work.end for work in chunk.works), self._formats[layer].row_bytes)
        target = rows[: shape[0] * shape[1] * shape[2]].view(shape)
        stored = self._stored.get((layer, batch))
        ticket = self._lane_in.submit(
            lambda: self._bring(layer, batch, chunk, slot, target), after=[stored] if stored else []
        )
        self._arriving[layer, batch] = (ticket, target)

    def _bring(self, layer: int, batch: int, chunk: Chunk, slot: int, target: Tensor) -> None:
        free = self._staged[slot]
        if free is not None:
            free.synchronize()
        width, staged = self._formats[layer].row_bytes, 0
        for index, work in enumerate(chunk.works):
            size = work.start * width
            if self._tiers[layer] == "disk":
                source = target[index, : work.start].view(-1)
                if not self._host_attention:
                    source = self._staging[slot][staged : staged + size]
                    staged += size
                with self._lane_in.booking(DISK_TO_HOST, "cache", size):
                    self._read_disk(layer, batch, work, source)
            else:
                source = self._region_rows(layer, batch)[work.slot, : work.start].view(-1)
            if not self._host_attention:
                goal = target[index, : work.start].view(-1)
                self._lane_in.copy(goal, source, link=HOST_TO_DEVICE, content="cache")
            # Rows beyond a sequence's end are masked, but a NaN among them would survive the mask.
            target[index, work.start :].zero_()
        self._staged[slot] = self._lane_in.fence()

    def arrive(self, layer: int, batch: int) -> None:
        """Wait for the rows that were prefetched for this visit."""
        if (layer, batch) in self._arriving:
            ticket, _ = self._arriving[layer, batch]
            if self._host_attention:
                ticket.wait_on_host()
            else:
                ticket.wait()

    def rows(self, layer: int, batch: int, chunk: Chunk, new_rows: Tensor) -> CachedRows:
        """Keys and values for a decode chunk, the new tokens' among them; on the device, or on the host if
        attention runs there.

        `new_rows` `[sequences, row bytes]` must be on the side where attention runs.
        """
        if (layer, batch) in self._arriving:
            return self._arrived_rows(layer, batch, chunk, new_rows)
        if self._tiers[layer] == "host":  # attended in place: the new rows must lie there first
            self._wait_until_stored(layer, batch)
        region = self._region_rows(layer, batch)
        slots = [work.slot for work in chunk.works]
        first, last = min(slots), max(slots)
        # Idle slots in between are attended too, for one row, which costs less than copying the others.
        here = region[first : last + 1, : max(work.end for work in chunk.works)]
        seats = None if len(slots) == last + 1 - first else [slot - first for slot in slots]
        return CachedRows(*self._formats[layer].decode(here), seats)

    def _arrived_rows(self, layer: int, batch: int, chunk: Chunk, new_rows: Tensor) -> CachedRows:
        self.arrive(layer, batch)
        _, target = self._arriving.pop((layer, batch))
        index = torch.arange(len(chunk.works), device=target.device)
        ends = torch.tensor([work.start for work in chunk.works], device=target.device)
        target[index, ends] = new_rows
        return CachedRows(*self._formats[layer].decode(target), None)

    # --- writing -----------------------------------------------------------------------------------------

    def append(self, layer: int, batch: int, chunk: Chunk, key: Tensor, value: Tensor) -> Tensor:
        """Encode a chunk's new keys and values `[tokens, key heads, size]` and send them to their region.

        Returns the encoded rows `[tokens, row bytes]`, on the device.
        """
        rows = self._formats[layer].encode(key, value)
        if self._tiers[layer] == "device":
            _scatter(self._region_rows(layer, batch), chunk, rows)
            return rows
        self._let_rows_leave()
        self._stored[layer, batch] = self._lane_out.submit(
            lambda: self._send(layer, batch, chunk, rows), uses=[rows]
        )
        self._leaving.append(self._stored[layer, batch])
        return rows

    def _let_rows_leave(self) -> None:
        """Rows stay in device memory until they have been sent: wait while too many still do."""
        while len(self._leaving) >= ROWS_IN_FLIGHT:
            self._leaving.popleft().wait_on_host()

    def _send(self, layer: int, batch: int, chunk: Chunk, rows: Tensor) -> None:
        width = self._formats[layer].row_bytes
        if self._tiers[layer] == "host" and chunk.is_prefill:
            start = 0
            for work in chunk.works:  # a prompt's rows lie side by side in its slot
                target = self._region_rows(layer, batch)[work.slot, work.start : work.end]
                source = rows[start : start + work.count]
                self._lane_out.copy(target, source, link=DEVICE_TO_HOST, content="cache")
                start += work.count
            return
        staging = self._outgoing[: rows.numel()].view(rows.shape)
        self._lane_out.copy(staging, rows, link=DEVICE_TO_HOST, content="cache")
        self._lane_out.synchronize()
        if self._tiers[layer] == "host":
            _scatter(self._region_rows(layer, batch), chunk, staging)
            return
        with self._lane_out.booking(HOST_TO_DISK, "cache", rows.numel()):
            start = 0
            for work in chunk.works:
                offset = self._disk_offset(layer, batch, work) + work.start * width
                assert self._disk is not None
                self._disk.write(offset, staging[start : start + work.count].view(-1))
                start += work.count

    def _wait_until_stored(self, layer: int, batch: int) -> None:
        ticket = self._stored.get((layer, batch))
        if ticket is not None:
            ticket.wait_on_host()

    # --- places ------------------------------------------------------------------------------------------

    def _region_rows(self, layer: int, batch: int) -> Tensor:
        region = self._regions[layer, batch]
        assert isinstance(region, Tensor)
        return region

    def _disk_offset(self, layer: int, batch: int, work: Work) -> int:
        region = self._regions[layer, batch]
        assert isinstance(region, int)
        return region + work.slot * self._shape.batches[batch].capacity * self._formats[layer].row_bytes

    def _read_disk(self, layer: int, batch: int, work: Work, target: Tensor) -> None:
        assert self._disk is not None
        self._disk.read(self._disk_offset(layer, batch, work), target)

    def close(self) -> None:
        """Give the memory back; the lanes must be idle."""
        self._regions, self._ring, self._staging = {}, [], []
        self._arriving = {}
        self._device_slab.close()
        self._host_slab.close()


def _scatter(region: Tensor, chunk: Chunk, rows: Tensor) -> None:
    """Put a chunk's rows `[tokens, row bytes]` into their region `[slots, capacity, row bytes]`."""
    if not chunk.is_prefill:
        slots = torch.tensor([work.slot for work in chunk.works], device=region.device)
        positions = torch.tensor([work.start for work in chunk.works], device=region.device)
        region[slots, positions] = rows
        return
    start = 0
    for work in chunk.works:
        region[work.slot, work.start : work.end] = rows[start : start + work.count]
        start += work.count
