"""Desks: host memory through which what little a decode step exchanges passes between device and host.

New rows and queries cross to a desk, what host attention found crosses from it. It always lies at the same
place, so that crossing can be recorded with a visit.
"""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from capstan.generation.attention.row_format import RowFormat
from capstan.generation.planning.cache_buffers import DeskSizes
from capstan.storage import Slab
from capstan.transport import Ticket


class Fetch(NamedTuple):
    """Rows of one batch and layer on their way."""

    ticket: Ticket
    target: Tensor  # (sequences, rows, row bytes)


class Places(NamedTuple):
    """A desk as one layer sees it, when so many sequences decode. All on the host but the last."""

    rows: Tensor  # uint8 [sequences, row bytes]
    queries: Tensor  # [sequences, heads, key size]
    found: Tensor  # [sequences, heads, value size]
    result: Tensor  # the same on the device; empty where the host does not attend


class Desk:
    """The desk of one batch: flat memory, seen as each layer's tensors."""

    def __init__(self, rows: Tensor, queries: Tensor, found: Tensor, result: Tensor | None) -> None:
        self._rows, self._queries, self._found, self._result = rows, queries, found, result
        self._seen: dict[tuple[int, int], Places] = {}

    @classmethod
    def of(cls, sizes: DeskSizes, *, host: Slab, device: Slab | None) -> "Desk":
        """Take a desk's memory; `device` is None for a batch that the host does not attend."""
        rows, queries, found = map(host.take, sizes)
        return cls(rows, queries, found, device.take(sizes.result) if device is not None else None)

    def places(self, layout: RowFormat, count: int) -> Places:
        """The desk for `count` sequences, the same tensors each time."""
        if (id(layout), count) not in self._seen:
            geometry, dtype = layout.geometry, layout.dtype
            results = (count, geometry.num_query_heads, geometry.value_size)
            self._seen[id(layout), count] = Places(
                shaped(self._rows, torch.uint8, (count, layout.row_bytes)),
                shaped(self._queries, dtype, (count, geometry.num_query_heads, geometry.key_size)),
                shaped(self._found, dtype, results),
                self._found[:0] if self._result is None else shaped(self._result, dtype, results),
            )
        return self._seen[id(layout), count]


def shaped(run: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The beginning of flat uint8 memory, seen as a tensor."""
    return run[: prod(shape) * dtype.itemsize].view(dtype).view(shape)
