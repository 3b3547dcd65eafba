"""Packing: exact round trips, the promised layout, the promised size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.codecs.bits import WIDTHS, pack, packed_bytes, unpack

rows = st.tuples(st.sampled_from(WIDTHS), st.integers(1, 4), st.integers(1, 41), st.integers(0, 2**32))


def _random_codes(num_bits: int, num_rows: int, num_codes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**num_bits, (num_rows, num_codes), dtype=torch.uint8, generator=generator)


@settings(max_examples=60, deadline=None)
@given(rows)
def test_unpack_inverts_pack_in_the_promised_size(row):
    num_bits, num_rows, num_codes, seed = row
    codes = _random_codes(num_bits, num_rows, num_codes, seed)
    packed = pack(codes, num_bits)
    assert packed.shape == (num_rows, packed_bytes(num_codes, num_bits))
    assert torch.equal(unpack(packed, num_codes, num_bits), codes)


@settings(max_examples=60, deadline=None)
@given(rows)
def test_bit_b_of_code_i_is_bit_i_times_num_bits_plus_b_of_the_row_and_the_rest_is_0(row):
    num_bits, num_rows, num_codes, seed = row
    codes = _random_codes(num_bits, num_rows, num_codes, seed)
    packed = pack(codes, num_bits)
    for codes_of_row, bytes_of_row in zip(codes.tolist(), packed.tolist(), strict=True):
        as_integer = sum(code << (index * num_bits) for index, code in enumerate(codes_of_row))
        assert int.from_bytes(bytes(bytes_of_row), "little") == as_integer


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_views_of_any_offset_and_stride_are_packed_and_unpacked(num_bits):
    codes = _random_codes(num_bits, 3, 33, 0)
    packed = pack(codes[:, 1:], num_bits)
    assert torch.equal(packed, pack(codes[:, 1:].clone(), num_bits))
    records = torch.full((3, packed.shape[1] + 3), 255, dtype=torch.uint8)
    records[:, 1:-2] = packed
    assert torch.equal(unpack(records[:, 1:-2], 32, num_bits), codes[:, 1:])


def test_four_bit_codes_lie_low_nibble_first():
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]
