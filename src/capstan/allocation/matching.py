"""Bottleneck matching: pair two groups of devices so that the slowest pair is as fast as possible."""

from typing import NamedTuple

import numpy as np

from capstan.allocation.pair_seconds import Numbers, Seconds


class Matching(NamedTuple):
    """`partner[i]` is the column of row i; `seconds` the dearest chosen entry."""

    seconds: float
    partner: tuple[int, ...]


def bottleneck_seconds(seconds: Seconds) -> Seconds:
    """The cheapest dearest entry of a perfect matching, for each of (blocks, size, size) matrices.

        min over perfect matchings M of max over (i, j) in M of seconds[i, j]

    No matching is cheaper than the dearest of all rows' and columns' cheapest entries, so that is tried first;
    where it does not suffice, a binary search over the sorted larger entries finds the answer.

    Source: the edge between two stages of DT-FM, arXiv 2206.01288. Differs: the same value, by O(log size)
    tests whether a matching exists instead of one assignment problem for each entry that is struck out.
    """
    bound = np.maximum(seconds.min(2).max(1), seconds.min(1).max(1))
    found = bound.copy()
    for block, rows in enumerate(_rows_as_bits(seconds <= bound[:, None, None])):
        if _perfect_matching(rows) is None:
            found[block] = _search(seconds[block], float(bound[block]))
    return found


def bottleneck_matching(seconds: Seconds) -> Matching:
    """One matching that reaches `bottleneck_seconds`, of a (size, size) matrix."""
    most = float(bottleneck_seconds(seconds[None])[0])
    partner = _perfect_matching(_rows_as_bits((seconds <= most)[None])[0])
    assert partner is not None
    return Matching(most, tuple(bits.bit_length() - 1 for bits in partner))


def _search(seconds: Seconds, below: float) -> float:
    """The smallest entry above `below` up to which a perfect matching exists."""
    entries = np.unique(seconds[seconds > below])
    low, high = 0, len(entries) - 1
    while low < high:
        middle = (low + high) // 2
        if _perfect_matching(_rows_as_bits((seconds <= entries[middle])[None])[0]) is None:
            low = middle + 1
        else:
            high = middle
    return float(entries[low])


def _rows_as_bits(allowed: Numbers | np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> list[list[int]]:
    """Each row of (blocks, size, size) truth values as one integer, column j in bit j."""
    blocks, size, _ = allowed.shape
    packed = np.packbits(allowed, axis=-1, bitorder="little")
    width = packed.shape[-1]
    text = packed.tobytes()
    rows = [int.from_bytes(text[at : at + width], "little") for at in range(0, len(text), width)]
    return [rows[block * size : (block + 1) * size] for block in range(blocks)]


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
