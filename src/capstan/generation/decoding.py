"""The sequences of one GPU batch that decode in a sweep: where they sit, their attention on the device."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from capstan.generation.attention import decode_attention, visible_rows
from capstan.generation.batching import Chunk
from capstan.generation.host_attention import Seats, attend_on_host, reads_in_place
from capstan.generation.row_format import RowFormat


@dataclass(kw_only=True)
class Decoding:
    """A decode chunk with the tensors that every layer uses."""

    chunk: Chunk
    seats: Seats  # on the host, in a region
    slots: Tensor  # on the device
    starts: Tensor  # on the device: the row of each new token
    ends: list[int]
    _masks: dict[tuple[bool, int | None], Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, chunk: Chunk, device: torch.device) -> "Decoding":
        """The tensors of a decode chunk."""
        ends = [work.end for work in chunk.works]
        seats = Seats.of([work.slot for work in chunk.works], ends)
        return cls(
            chunk=chunk,
            seats=seats,
            slots=seats.slots.long().to(device),
            starts=(seats.ends.long() - 1).to(device),
            ends=ends,
        )

    @property
    def num_rows(self) -> int:
        """Rows of the longest sequence."""
        return max(self.ends)

    def attend(self, query: Tensor, rows: Tensor, seats: Seats, layout: RowFormat) -> Tensor:
        """Attention over `rows` `[slots, rows, row bytes]` on the device, in which sequences sit as `seats`
        says.

        query: `[sequences, heads, size]`. Returns `[sequences, heads, value size]`.
        """
        if query.device.type == "cpu" and reads_in_place(layout, query.dtype):
            geometry = layout.geometry
            out = query.new_empty(len(query), geometry.num_query_heads, geometry.value_size)
            attend_on_host(query.contiguous(), rows, layout, seats, out=out)
            return out
        # Idle slots in between are attended too, for one row, which costs less than copying the others.
        slots = seats.slots.tolist()
        here = rows[min(slots) : max(slots) + 1, : self.num_rows]
        is_dense = len(here) == len(slots)
        visible = self._mask(layout.geometry.sliding_window, is_dense=is_dense)
        keys, values = layout.decode(here)
        if is_dense:
            return decode_attention(query, keys, values, visible, layout.geometry)
        places = self.slots - min(slots)
        seated = query.new_zeros(len(here), *query.shape[1:])
        seated[places] = query
        return decode_attention(seated, keys, values, visible, layout.geometry)[places]

    def _mask(self, window: int | None, *, is_dense: bool) -> Tensor | None:
        if (is_dense, window) not in self._masks:
            ends = torch.tensor(self.ends)
            if not is_dense:  # an idle slot in between shows one row
                slots = self.seats.slots.long() - self.seats.slots.min()
                seated = torch.ones(int(slots.max()) + 1, dtype=torch.long)
                seated[slots] = ends
                ends = seated
            mask = visible_rows(ends, self.num_rows, window)
            self._masks[is_dense, window] = None if mask is None else mask.to(self.slots.device)
        return self._masks[is_dense, window]
