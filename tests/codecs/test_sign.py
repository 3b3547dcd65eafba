"""One bit an element: sizes, scales and the contraction that error feedback needs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.codecs import Sign, codec_from_name
from capstan.codecs.bitmaps import pack_bits, unpack_bits
from capstan.errors import InputError, UsageError


def test_a_bit_an_element_and_a_scale_a_block():
    assert Sign(block_size=1024).encoded_bytes((2048,), torch.float32) == 2048 // 8 + 2 * 4
    assert Sign(block_size=1024).encoded_bytes((1025,), torch.float32) == 129 + 2 * 4


def test_the_scale_is_the_mean_absolute_value_of_its_block():
    values = torch.tensor([1.0, -2.0, 3.0, -4.0, 0.0, 0.0, 0.0, -2.0, 10.0, -30.0])
    codec = Sign(block_size=8)
    expected = [1.5, -1.5, 1.5, -1.5, 1.5, 1.5, 1.5, -1.5, 20.0, -20.0]
    assert codec.decode(codec.encode(values)).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), block=st.sampled_from([8, 64, 1024]), seed=st.integers(0, 2**31))
def test_the_error_is_what_the_docstring_says(size, block, seed):
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    codec = Sign(block_size=block)
    decoded = codec.decode(codec.encode(values))
    predicted = values.double().pow(2).sum() - decoded.double().pow(2).sum()
    found = (values - decoded).double().pow(2).sum().item()
    # float32's mean of n numbers is off by at most n * 2**-24 of itself, twice that in its square, of which
    # there are as many as values; and every difference is rounded once, which its square is off by twice.
    of_scales = 2 * min(size, block) * 2.0**-24 * decoded.double().pow(2).sum().item()
    assert found == pytest.approx(predicted.item(), rel=2.0**-23, abs=1.01 * of_scales)


@settings(max_examples=60, deadline=None)
@given(flags=st.lists(st.booleans(), min_size=1, max_size=100))
def test_bits_come_back_and_the_first_lies_lowest(flags):
    packed = pack_bits(torch.tensor(flags))
    assert unpack_bits(packed, len(flags)).bool().tolist() == flags
    assert int(packed[0]) & 1 == flags[0]
    assert sum(int(byte).bit_count() for byte in packed) == sum(flags)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="finite"):
        Sign().encode(torch.tensor([1.0, float("inf")]))


def test_block_sizes_that_do_not_end_a_byte_are_refused():
    with pytest.raises(UsageError, match="multiple of 8"):
        codec_from_name("sign:12")
    with pytest.raises(UsageError, match="sign:1024"):
        codec_from_name("sign:big")
