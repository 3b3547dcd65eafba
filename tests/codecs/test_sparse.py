"""Top-k and random-k: what is kept, where it goes, and positions in few bits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.codecs import RandomK, TopK, codec_from_name
from capstan.codecs.index_sets import index_bytes, read_positions, write_positions
from capstan.errors import InputError, UsageError


@settings(max_examples=100, deadline=None)
@given(limit=st.integers(1, 5000), data=st.data())
def test_positions_come_back_in_the_promised_size(limit, data):
    chosen = sorted(data.draw(st.sets(st.integers(0, limit - 1), max_size=min(limit, 200))))
    packed = write_positions(torch.tensor(chosen, dtype=torch.int64), limit)
    assert packed.numel() == index_bytes(len(chosen), limit)
    assert read_positions(packed, len(chosen), limit).tolist() == chosen


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1])
def test_positions_take_about_two_bits_more_than_there_must_be(fraction):
    limit = 10**6
    count = int(fraction * limit)
    least_bits = math.log2(math.comb(limit, count)) / count
    # At most 2 + log2(n / k) bits against log2(e n / k): 0.56 more, and 1 for the rounding of log2(n / k).
    assert 8 * index_bytes(count, limit) / count <= least_bits + 1.6


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 2000), seed=st.integers(0, 2**31), fraction=st.floats(0.001, 1))
def test_topk_keeps_the_largest_exactly_and_the_rest_is_0(size, seed, fraction):
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    codec = TopK(fraction=fraction)
    decoded, kept = codec.decode(codec.encode(values)), codec.num_kept((size,))
    assert int((decoded != 0).sum()) == kept
    assert torch.equal(decoded[decoded != 0], values[decoded != 0])
    if kept < size:
        assert decoded.abs()[decoded != 0].min() >= values[decoded == 0].abs().max()


def test_of_equal_elements_the_first_are_kept():
    codec = TopK(fraction=0.5)
    assert codec.decode(codec.encode(torch.tensor([1.0, -1.0, 1.0, 1.0]))).tolist() == [1.0, -1.0, 0.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**62), fraction=st.floats(0.001, 1))
def test_randomk_keeps_so_many_and_eight_bytes_say_which(size, seed, fraction):
    values = torch.arange(1.0, size + 1)
    codec = RandomK(fraction=fraction)
    packet = codec.encode(values, seed=seed)
    assert packet.payload.numel() == 8 + 4 * codec.num_kept((size,))
    decoded = codec.decode(packet)
    assert int((decoded != 0).sum()) == codec.num_kept((size,))
    assert torch.equal(decoded[decoded != 0], values[decoded != 0])


def test_randomk_keeps_every_element_about_equally_often():
    codec, counts = RandomK(fraction=0.25), torch.zeros(40)
    for seed in range(2000):
        counts += codec.decode(codec.encode(torch.ones(40), seed=seed))
    # 500 expected of 2000 draws with p = 1/4: the standard deviation is 19.4, five of them are 97.
    assert (counts - 500).abs().max() < 97


def test_randomk_needs_a_seed():
    with pytest.raises(UsageError, match="seed"):
        RandomK(fraction=0.1).encode(torch.ones(10))


def test_damaged_positions_are_refused():
    codec = TopK(fraction=0.1)
    packet = codec.encode(torch.randn(1000, generator=torch.Generator().manual_seed(1)))
    packet.payload[: index_bytes(100, 1000)] = 0
    with pytest.raises(InputError, match="damaged"):
        codec.decode(packet)
    packet.payload[: index_bytes(100, 1000)] = 255
    with pytest.raises(InputError, match="damaged"):
        codec.decode(packet)


def test_nan_is_refused():
    with pytest.raises(InputError, match="NaN"):
        TopK(fraction=0.5).encode(torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize(
    "name", ["topk", "topk:0", "topk:2", "topk:x", "topk:0.1:int8", "randomk:1e", "topk:."]
)
def test_names_that_make_no_sense_are_refused(name):
    with pytest.raises(UsageError):
        codec_from_name(name)
