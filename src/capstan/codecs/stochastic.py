"""Random numbers that are a function of a seed and an index, the same on every device."""

import torch
from torch import Tensor

_MASK = 2**32 - 1
# Multipliers of a 32-bit mixing function with low bias. The second is written as the negative number equal to
# it modulo 2**32, so that no product overflows 64 bits.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32


def uniform(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """Numbers first .. first + count - 1 of stream `seed`: float32, multiples of 2**-24 in [0, 1).

    Number i is the upper 24 bits of a mixing function of i that takes two keys, made from the seed (modulo
    2**64) and the high word of i: no generator, no order, no state. All in integers below 2**63, so every
    device gives the same bits.

    Source: C. Wellons, "Prospecting for Hash Functions" (2018), the function there called lowbias32.
    Differs: a key enters before each multiplication; with one key, streams would be one stream, shifted.
    """
    start, high = first & _MASK, first >> 32
    if start + count > 2**32:  # the high word changes on the way
        head = 2**32 - start
        rest = uniform(seed, first + head, count - head, device)
        return torch.cat((uniform(seed, first, head, device), rest))
    words = torch.arange(start, start + count, dtype=torch.int64, device=device)
    return (_mix(words, *_keys(seed, high)) >> 8).to(torch.float32).mul_(2.0**-24)


def _mix(words: Tensor, key: int, second_key: int) -> Tensor:
    words.bitwise_xor_(key)
    words.bitwise_xor_(words >> 16).mul_(_FIRST).bitwise_and_(_MASK).bitwise_xor_(second_key)
    words.bitwise_xor_(words >> 15).mul_(_SECOND).bitwise_and_(_MASK)
    return words.bitwise_xor_(words >> 16)


def _keys(seed: int, high: int) -> tuple[int, int]:
    state = 0
    for word in (seed, seed >> 32, high):
        state = _mix_int(state + 1 + (word & _MASK))
    return state, _mix_int(state + 1)


def _mix_int(word: int) -> int:
    word &= _MASK
    word = (word ^ (word >> 16)) * _FIRST & _MASK
    word = (word ^ (word >> 15)) * _SECOND & _MASK
    return word ^ (word >> 16)
