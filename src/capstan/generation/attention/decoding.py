"""The sequences of one GPU batch that decode in a sweep: where they sit, their attention on the device."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from capstan.generation.attention.host_attention import Seats, attend_on_host, reads_in_place
from capstan.generation.attention.packed import decode_attention, visible_rows
from capstan.generation.attention.row_format import RowFormat
from capstan.generation.planning.batching import Chunk

# Of rows that rest on the device so many more are attended, masked, than the longest sequence has, that
# attention keeps its shape, and what was recorded of it its worth, for this many sweeps.
_STEADY_ROWS = 64


class Form(NamedTuple):
    """What decode chunks must share so that their attention has the same shape, at the same places."""

    slots: tuple[int, ...]
    reach: int  # rows that attention looks at where they rest


def form_of(chunk: Chunk) -> Form:
    """A decode chunk's form; in most sweeps it is that of the sweep before."""
    most = max(work.end for work in chunk.works)
    return Form(tuple(work.slot for work in chunk.works), -(-most // _STEADY_ROWS) * _STEADY_ROWS)


@dataclass(kw_only=True, eq=False)
class Decoding:
    """A decode chunk with the tensors that every layer uses; chunks of the same form can take turns in it."""

    chunk: Chunk
    seats: Seats  # on the host, in a region
    slots: Tensor  # on the device
    starts: Tensor  # on the device: the row of each new token
    ends: list[int]
    form: Form
    _masks: dict[int | None, Tensor] = field(default_factory=dict)  # for rows that rest on the device
    _brought_masks: dict[int | None, Tensor | None] = field(default_factory=dict)

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
            form=form_of(chunk),
        )

    def follow(self, chunk: Chunk) -> None:
        """Become those of another chunk of the same form."""
        self.chunk, self.ends = chunk, [work.end for work in chunk.works]
        self.seats = Seats.of([work.slot for work in chunk.works], self.ends)
        self.starts.copy_(self.seats.ends.long() - 1)
        self._brought_masks.clear()
        for window, mask in self._masks.items():
            mask.copy_(self._resting_mask(window, mask.shape[-1]))

    @property
    def num_rows(self) -> int:
        """Rows of the longest sequence."""
        return max(self.ends)

    def attend_brought(self, query: Tensor, rows: Tensor, layout: RowFormat) -> Tensor:
        """Attention over `rows` `[sequences, rows, row bytes]`, brought for these sequences alone.

        query: `[sequences, heads, size]`. Returns `[sequences, heads, value size]`.
        """
        seats = Seats.of(list(range(len(self.ends))), self.ends)
        if _reads_in_place(query, layout):
            return _attend_in_place(query, rows, layout, seats)
        window = layout.geometry.sliding_window
        if window not in self._brought_masks:
            visible = visible_rows(seats.ends.long(), rows.shape[1], window)
            self._brought_masks[window] = None if visible.all() else visible.to(query.device)
        keys, values = layout.decode(rows)
        return decode_attention(query, keys, values, self._brought_masks[window], layout.geometry)

    def attend_resting(self, query: Tensor, rows: Tensor, layout: RowFormat) -> Tensor:
        """Attention over `rows` `[slots, capacity, row bytes]` where they rest on the device.

        query: `[sequences, heads, size]`. Returns `[sequences, heads, value size]`.
        """
        if _reads_in_place(query, layout):
            return _attend_in_place(query, rows, layout, self.seats)
        # Idle slots in between are attended too, for one row, which costs less than copying the others.
        first, last = min(self.form.slots), max(self.form.slots)
        here = rows[first : last + 1, : self.form.reach]
        window = layout.geometry.sliding_window
        if window not in self._masks:
            self._masks[window] = self._resting_mask(window, here.shape[1]).to(query.device)
        keys, values = layout.decode(here)
        if len(here) == len(self.ends):
            return decode_attention(query, keys, values, self._masks[window], layout.geometry)
        places = self.slots - first
        seated = query.new_zeros(len(here), *query.shape[1:])
        seated[places] = query
        return decode_attention(seated, keys, values, self._masks[window], layout.geometry)[places]

    def _resting_mask(self, window: int | None, num_rows: int) -> Tensor:
        """On the host, also where every row is visible: which ones are changes from sweep to sweep."""
        slots = self.seats.slots.long() - self.seats.slots.min()
        ends = torch.ones(int(slots.max()) + 1, dtype=torch.long)
        ends[slots] = self.seats.ends.long()
        return visible_rows(ends, num_rows, window)


def _reads_in_place(query: Tensor, layout: RowFormat) -> bool:
    return query.device.type == "cpu" and reads_in_place(layout, query.dtype)


def _attend_in_place(query: Tensor, rows: Tensor, layout: RowFormat, seats: Seats) -> Tensor:
    geometry = layout.geometry
    out = query.new_empty(len(query), geometry.num_query_heads, geometry.value_size)
    attend_on_host(query.contiguous(), rows, layout, seats, out=out)
    return out
