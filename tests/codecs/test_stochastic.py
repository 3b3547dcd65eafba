"""The counter-based random numbers: a pure function, and uniform."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.codecs.stochastic import uniform

CPU = torch.device("cpu")
MASK = 2**32 - 1


def _mix(word: int, second_key: int) -> int:
    word = ((word ^ (word >> 16)) * 0x7FEB352D & MASK) ^ second_key
    word = (word ^ (word >> 15)) * 0x846CA68B & MASK
    return word ^ (word >> 16)


def _oracle(seed: int, index: int) -> float:
    key = 0
    for word in (seed, seed >> 32, index >> 32):
        key = _mix(key + 1 + (word & MASK) & MASK, 0)
    return (_mix(index & MASK ^ key, _mix(key + 1 & MASK, 0)) >> 8) / 2**24


@settings(max_examples=40, deadline=None)
@given(st.integers(-(2**63), 2**64), st.integers(0, 2**40), st.integers(1, 20))
def test_number_i_is_the_upper_24_bits_of_the_mixing_function_in_exact_integers(seed, first, count):
    expected = [_oracle(seed, index) for index in range(first, first + count)]
    assert uniform(seed, first, count, CPU).tolist() == expected


def test_the_high_word_of_the_index_changes_in_the_middle_of_a_block():
    first = 2**32 - 5
    whole = uniform(7, first, 10, CPU)
    assert whole.tolist() == [_oracle(7, index) for index in range(first, first + 10)]


def test_numbers_are_uniform_and_unrelated_to_their_neighbours_and_to_other_seeds():
    count = 2**18
    one, other = uniform(0, 0, count, CPU).double(), uniform(1, 0, count, CPU).double()
    # Six standard deviations of each statistic for independent uniform numbers.
    six = 6 / math.sqrt(count)
    assert abs(one.mean() - 0.5) < six * math.sqrt(1 / 12)
    centred, other_centred = one - 0.5, other - 0.5
    assert abs((centred[1:] * centred[:-1]).mean()) < six / 12
    assert abs((centred * other_centred).mean()) < six / 12
    counts = torch.histc(one, bins=256, min=0, max=1)
    chi_squared = ((counts - count / 256) ** 2 / (count / 256)).sum()
    assert abs(chi_squared - 255) < 6 * math.sqrt(2 * 255)


def test_streams_are_not_one_stream_shifted():
    one, other = (set(uniform(seed, 0, 2**12, CPU).tolist()) for seed in (0, 1))
    # Of 2**12 numbers out of 2**24, one in 2**12 meets a number of the other stream by chance: about 1.
    assert len(one & other) < 12
