"""Permutations that are functions of a key, the same on every machine and with every version of NumPy.

`Generator.permutation` may change from one NumPy to the next; the raw words of Philox may not. So a
permutation here is the order of as many raw words.
"""

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def words(count: int, *key: int) -> NDArray[np.uint64]:
    """`count` words of 64 bits, drawn by a Philox generator of this key."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def permutation(count: int, *key: int) -> Indices:
    """A permutation of 0 … count - 1 that this key alone decides."""
    # Each word's low bits give way to its place, so that sorting the words themselves, which is several times
    # as fast as argsort, tells the order; equal high bits keep the order of their places.
    low = np.uint64((1 << max(1, count - 1).bit_length()) - 1)
    drawn = (words(count, *key) & ~low) | np.arange(count, dtype=np.uint64)
    drawn.sort()
    return (drawn & low).astype(np.int64)


def below(limits: Indices | int, count: int, *key: int) -> Indices:
    """For each of `count` draws a number from 0 to its limit, which is not included.

    It is the upper half of a 32-bit word times the limit: a number is off from 1/limit by less than 2**-32.
    """
    drawn = words(count, *key) >> np.uint64(32)
    return ((drawn * np.asarray(limits, np.uint64)) >> np.uint64(32)).astype(np.int64)
