"""Bottleneck matching: pair two groups of devices so that the slowest pair is as fast as possible."""

from typing import NamedTuple

import numpy as np

from capstan.allocation.pair_seconds import Seconds


class Matching(NamedTuple):
    """`partner[i]` is the column of row i; `seconds` the dearest chosen entry."""

    seconds: float
    partner: tuple[int, ...]


def bottleneck_seconds(seconds: Seconds) -> Seconds:
    """The cheapest dearest entry of a perfect matching, for each of (blocks, size, size) matrices.

        min over perfect matchings M of max over (i, j) in M of seconds[i, j]

    No matching is cheaper than the dearest of all rows' and columns' cheapest entries, so that is tried
    first; where it does not suffice, a binary search over the sorted larger entries finds the answer.

    Source: the edge between two stages of DT-FM, arXiv 2206.01288. Differs: the same value, by O(log size)
    tests whether a matching exists instead of one assignment problem for each entry that is struck out.
    """
    bound: Seconds = np.maximum(seconds.min(2).max(1), seconds.min(1).max(1))
    fails = np.array([_perfect_matching(rows) is None for rows in _rows_as_bits(seconds, bound)])
    if fails.any():
        bound[fails] = _search(seconds[fails], bound[fails])
    return bound


def bottleneck_matching(seconds: Seconds) -> Matching:
    """One matching that reaches `bottleneck_seconds`, of a (size, size) matrix."""
    most = float(bottleneck_seconds(seconds[None])[0])
    partner = _perfect_matching(_rows_as_bits(seconds[None], np.array([most]))[0])
    assert partner is not None
    return Matching(most, tuple(bits.bit_length() - 1 for bits in partner))


def _search(seconds: Seconds, below: Seconds) -> Seconds:
    """For each block the smallest entry above `below` up to which a perfect matching exists."""
    entries = np.sort(seconds.reshape(len(seconds), -1), axis=1)
    blocks = np.arange(len(seconds))
    low = (entries <= below[:, None]).sum(axis=1)
    high = np.full_like(low, entries.shape[1] - 1)
    while (unsure := low < high).any():
        middle = (low + high) // 2
        part = blocks[unsure]
        rows = _rows_as_bits(seconds[part], entries[part, middle[part]])
        fails = np.array([_perfect_matching(each) is None for each in rows])
        low[part[fails]] = middle[part[fails]] + 1
        high[part[~fails]] = middle[part[~fails]]
    found: Seconds = entries[blocks, low]
    return found


def _rows_as_bits(seconds: Seconds, most: Seconds) -> list[list[int]]:
    """Of each (blocks, size, size) matrix its rows as integers: bit j says that entry j is at most `most`."""
    blocks, size, _ = seconds.shape
    packed = np.packbits(seconds <= most[:, None, None], axis=-1, bitorder="little")
    if size <= 64:
        words = np.zeros((blocks, size, 8), dtype=np.uint8)
        words[..., : packed.shape[-1]] = packed
        bits: list[list[int]] = words.view("<u8")[..., 0].tolist()
        return bits
    return [[int.from_bytes(row.tobytes(), "little") for row in block] for block in packed]


def _perfect_matching(rows: list[int]) -> list[int] | None:
    """For each row the bit of its column, or None where no perfect matching exists.

    Rows take the first free column; each that finds none looks for an augmenting path, breadth first.
    """
    free = (1 << len(rows)) - 1
    column = [0] * len(rows)
    owner: dict[int, int] = {}
    waiting = []
    for row, allowed in enumerate(rows):
        bit = allowed & free
        bit &= -bit
        if bit:
            column[row], owner[bit] = bit, row
            free ^= bit
        else:
            waiting.append(row)
    for start in waiting:
        bit = _augment(start, rows, column, owner, free)
        if not bit:
            return None
        free ^= bit
    return column


def _augment(start: int, rows: list[int], column: list[int], owner: dict[int, int], free: int) -> int:
    """Give row `start` a column by moving others; returns the column newly taken, or 0."""
    reached_from: dict[int, int] = {}
    queue, seen = [start], 0
    for row in queue:
        new = rows[row] & ~seen
        seen |= new
        taken = new & free
        if taken:
            taken &= -taken
            bit = taken
            while True:
                before = column[row]
                column[row], owner[bit] = bit, row
                if row == start:
                    return taken
                bit, row = before, reached_from[row]
        while new:
            bit = new & -new
            new ^= bit
            reached_from[owner[bit]] = row
            queue.append(owner[bit])
    return 0
