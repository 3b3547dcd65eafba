"""Where a block's cache rests: a region for each layer and GPU batch, a prefix for each layer."""

import torch
from torch import Tensor

from capstan.generation.attention.row_format import RowFormat
from capstan.generation.planning.batching import BlockShape, Work
from capstan.generation.planning.cache_buffers import region_rows
from capstan.generation.planning.placement import Tier
from capstan.storage import DiskSlab, Slab


class Regions:
    """Regions `[slots, rows, row bytes]` and prefixes `[prefix, row bytes]`, cut from slabs in order.

    A region on disk is an offset in the scratch file.
    """

    def __init__(
        self,
        formats: tuple[RowFormat, ...],
        tiers: tuple[Tier, ...],
        shape: BlockShape,
        *,
        device: Slab,
        host: Slab,
        disk: DiskSlab | None,
    ) -> None:
        self._formats, self._tiers, self._shape = formats, tiers, shape
        self.prefixes = [
            (device if tier == "device" else host)
            .take(shape.prefix * layout.row_bytes)
            .view(shape.prefix, layout.row_bytes)
            for layout, tier in zip(formats, tiers, strict=True)
        ]
        self._regions: dict[tuple[int, int], Tensor | int] = {}
        for layer, tier in enumerate(tiers):
            for batch in range(len(shape.batches)):
                size = self._dimensions(layer, batch)
                if tier == "disk":
                    assert disk is not None, "the planner reserves scratch space for a cache on disk"
                    self._regions[layer, batch] = disk.take(size.numel())
                else:
                    slab = device if tier == "device" else host
                    self._regions[layer, batch] = slab.take(size.numel()).view(size)

    def _dimensions(self, layer: int, batch: int) -> torch.Size:
        rows = region_rows(self._shape, batch, self._tiers[layer])
        return torch.Size((self._shape.batches[batch].slots, rows, self._formats[layer].row_bytes))

    def rows(self, layer: int, batch: int) -> Tensor:
        """A region in memory."""
        region = self._regions[layer, batch]
        assert isinstance(region, Tensor)
        return region

    def disk_offset(self, layer: int, batch: int, work: Work) -> int:
        """Where a sequence's rows after the prefix begin in the scratch file."""
        region = self._regions[layer, batch]
        assert isinstance(region, int)
        _, num_rows, row_bytes = self._dimensions(layer, batch)
        return region + work.slot * num_rows * row_bytes

    def own(self, work: Work) -> slice:
        """The rows of a piece of work in a slot that begins after the prefix."""
        return slice(work.start - self._shape.prefix, work.end - self._shape.prefix)

    def forget(self) -> None:
        """Hold on to no memory any more."""
        self._regions, self.prefixes = {}, []
