"""What a block's KV cache takes: its regions on each tier, and the buffers through which rows pass."""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from capstan.generation.attention.row_format import RowFormat
from capstan.generation.planning.batching import BlockShape
from capstan.generation.planning.placement import Placement, Tier
from capstan.storage.slab import aligned
from capstan.transport import Lane

# Batches whose rows are brought ahead of the one that is attended.
RING_SLOTS = 2

# So many chunks of prompts may wait in device memory for their rows to leave.
ROWS_IN_FLIGHT = 2


class DeskSizes(NamedTuple):
    """Host memory through which one batch's decoding sequences pass between device and cache."""

    rows: int
    queries: int
    result: int


class Lanes(NamedTuple):
    """What moves rows to the device and away from it; what attends them on the host."""

    rows_in: Lane
    rows_out: Lane
    attention: Lane


def host_bytes(
    formats: tuple[RowFormat, ...], placement: Placement, shape: BlockShape, *, tokens: int
) -> int:
    """All host memory of a block's cache."""
    rests = region_bytes(formats, placement.cache, shape, "host")
    prefixes = prefix_bytes(formats, placement.cache, shape, "host")
    return rests + prefixes + cache_buffers(formats, placement, shape, tokens=tokens).host_bytes


def desk_sizes(formats: tuple[RowFormat, ...], placement: Placement, slots: int) -> DeskSizes:
    """For a batch of `slots` slots."""
    away = [layout for layout, tier in zip(formats, placement.cache, strict=True) if tier != "device"]
    heads = [(layout.geometry, layout.dtype.itemsize) for layout in away]
    return DeskSizes(
        aligned(slots * max((layout.row_bytes for layout in away), default=0)),
        aligned(slots * max((g.num_query_heads * g.key_size * size for g, size in heads), default=0)),
        aligned(slots * max((g.num_query_heads * g.value_size * size for g, size in heads), default=0)),
    )


def region_rows(shape: BlockShape, batch: int, tier: Tier) -> int:
    """Rows of each slot of a batch: on the device all of a sequence's, elsewhere those after the prefix."""
    return shape.batches[batch].capacity - (0 if tier == "device" else shape.prefix)


def region_bytes(
    formats: tuple[RowFormat, ...], tiers: tuple[Tier, ...], shape: BlockShape, tier: Tier
) -> int:
    """Bytes of all regions that rest on `tier`."""
    rows = [each.slots * region_rows(shape, batch, tier) for batch, each in enumerate(shape.batches)]
    widths = Counter(layout.row_bytes for layout, where in zip(formats, tiers, strict=True) if where == tier)
    return sum(layers * aligned(count * row_bytes) for row_bytes, layers in widths.items() for count in rows)


def prefix_bytes(
    formats: tuple[RowFormat, ...], tiers: tuple[Tier, ...], shape: BlockShape, tier: Tier
) -> int:
    """Bytes of the prefixes that rest on the device or on the host: those of layers on disk too."""
    here = [
        (layout, (where == "device") == (tier == "device"))
        for layout, where in zip(formats, tiers, strict=True)
    ]
    return sum(aligned(shape.prefix * layout.row_bytes) for layout, is_here in here if is_here)


@dataclass(frozen=True, kw_only=True)
class CacheBuffers:
    """Sizes of what a block's cache needs beside its regions."""

    prefix_slot_bytes: int  # the prefix on its way to the device, for prompts that follow it
    ring_slot_bytes: int  # rows of one batch on their way to the device
    staging_slot_bytes: int  # rows of one batch on their way from disk
    outgoing_bytes: int  # rows of a chunk of prompts on their way to disk
    desk_bytes: int  # new rows, queries and results of decoding sequences, on the host
    result_bytes: int  # results of host attention, on the device

    @property
    def device_bytes(self) -> int:
        return self.prefix_slot_bytes + RING_SLOTS * self.ring_slot_bytes + self.result_bytes

    @property
    def host_bytes(self) -> int:
        return RING_SLOTS * self.staging_slot_bytes + self.outgoing_bytes + self.desk_bytes


def cache_buffers(
    formats: tuple[RowFormat, ...], placement: Placement, shape: BlockShape, *, tokens: int
) -> CacheBuffers:
    """The buffers beside the regions, when a chunk of prompts has at most `tokens`."""
    on_host = placement.host_batches(len(shape.batches))
    rows = [batch.slots * batch.capacity for batch in shape.batches]

    def widest(*where: Tier) -> int:
        pairs = zip(formats, placement.cache, strict=True)
        return max((layout.row_bytes for layout, tier in pairs if tier in where), default=0)

    crossing = max((count for batch, count in enumerate(rows) if batch not in on_host), default=0)
    desks = [desk_sizes(formats, placement, batch.slots) for batch in shape.batches]
    return CacheBuffers(
        prefix_slot_bytes=aligned(shape.prefix * widest("host", "disk")),
        ring_slot_bytes=aligned(crossing * widest("host", "disk")),
        staging_slot_bytes=aligned(max(rows) * widest("disk")),
        outgoing_bytes=aligned(tokens * widest("disk")),
        desk_bytes=sum(sum(sizes) for sizes in desks),
        result_bytes=sum(desks[batch].result for batch in on_host),
    )
