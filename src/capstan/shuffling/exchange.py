"""Buffers of rows that are exchanged one for one: a sliding window and a reservoir, as index arithmetic."""

import numpy as np

from capstan.shuffling.randomness import Indices

PASSES = -1


def exchange(slots: Indices, size: int) -> tuple[Indices, Indices]:
    """Rows arrive at a full buffer of `size` rows, each for one slot, and the slot's row is emitted.

    A row whose slot is `PASSES` is emitted itself. Returns what is emitted and what the buffer holds then, as
    indices into the buffer's rows followed by those that arrived.

    A slot's row is the one that came to it last. So an arrival emits the arrival before it with the same
    slot, or what the buffer held there; that is found for all of them by one stable sort.
    """
    arrivals = np.arange(len(slots), dtype=np.int64) + size
    emit = arrivals.copy()
    keep = np.arange(size, dtype=np.int64)
    stays = slots != PASSES
    inside, where = slots[stays], arrivals[stays]
    if not len(inside):
        return emit, keep
    by_slot = np.argsort(inside, kind="stable")
    sorted_slots, sorted_rows = inside[by_slot], where[by_slot]
    first = np.append(True, sorted_slots[1:] != sorted_slots[:-1])
    occupants = np.where(first, sorted_slots, np.append(0, sorted_rows[:-1]))
    emit[sorted_rows - size] = occupants
    last = np.append(first[1:], True)
    keep[sorted_slots[last]] = sorted_rows[last]
    return emit, keep
