"""What crosses the cut: positions and values in exactly the bytes that the formulas say; hostile bytes."""

import math
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from capstan.errors import InputError, UsageError
from capstan.federation import packets
from capstan.federation.index_codes import (
    INDEX_CODES,
    IndexSpace,
    expected_index_bytes,
    index_bytes,
    most_index_bytes,
    read_index,
    rice_bits,
    write_index,
)
from capstan.federation.packets import FRAMING_BYTES, CutPacket, message_sizes, read_packet, write_packet
from capstan.federation.value_codes import label_type, read_values, write_values


@st.composite
def sets_of_positions(draw):
    rows, width = draw(st.integers(1, 9)), draw(st.integers(1, 200))
    if draw(st.booleans()):
        kept = draw(st.integers(0, width))
        row = st.lists(st.integers(0, width - 1), min_size=kept, max_size=kept, unique=True)
        chosen = [at * width + each for at in range(rows) for each in sorted(draw(row))]
        return np.array(chosen, np.int64), IndexSpace(rows, width, rows * kept, kept > 0)
    chosen = sorted(draw(st.sets(st.integers(0, rows * width - 1))))
    return np.array(chosen, np.int64), IndexSpace(rows, width, len(chosen))


@pytest.mark.parametrize("name", INDEX_CODES)
@given(case=sets_of_positions())
@example(case=(np.array([0]), IndexSpace(1, 1, 1)))
@example(case=(np.arange(64), IndexSpace(8, 8, 64, True)))
@example(case=(np.array([199]), IndexSpace(1, 200, 1)))
def test_positions_come_back_and_take_what_the_formula_says(name, case):
    positions, space = case
    written = write_index(name, positions, space)
    assert np.array_equal(read_index(name, written, space), positions)
    n, k = space.limit, space.kept
    if not k:
        assert len(written) == 0
        return
    w, b = math.floor(math.log2(n / k)), rice_bits(space)
    gaps = np.diff(positions, prepend=-1) - 1
    low_and_high_bits = {
        "bitmap": (n, 0),
        "packed": (k * math.ceil(math.log2(space.width if space.is_even else n)), 0),
        "elias-fano": (k * w, k + (n - k) // 2**w),
        "rice": (k * b, k + int((gaps // 2**b).sum())),
    }[name]
    assert len(written) == sum(math.ceil(bits / 8) for bits in low_and_high_bits)
    assert len(written) <= most_index_bytes(name, space)
    assert index_bytes(name, space) in (len(written), None)


def test_rice_takes_on_average_what_is_expected():
    rng = np.random.default_rng(0)
    for keep in (0.1, 0.01):
        space = IndexSpace(32, 8192, int(keep * 262144))
        positions = np.sort(rng.choice(space.limit, space.kept, replace=False))
        taken = len(write_index("rice", positions, space))
        # The sum of k quotients of a geometric gap varies by sqrt(k) of them; 0.5 % is over 4 deviations.
        assert taken == pytest.approx(expected_index_bytes("rice", space), rel=5e-3 if keep == 0.1 else 2e-2)
    assert [rice_bits(IndexSpace(32, 8192, k)) for k in (26214, 2621)] == [3, 6]


def test_a_bitmap_is_smaller_than_packed_positions_above_one_in_log2_of_the_width():
    def smaller(kept):
        space = IndexSpace(1, 8192, kept, True)
        return index_bytes("bitmap", space) < index_bytes("packed", space)

    assert not smaller(8192 // 13)
    assert smaller(8192 // 13 + 2)


@given(values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), max_size=40))
@example(values=[1e-38, 3e-39])
@example(values=[2.0**-149])
def test_values_come_back_within_their_bounds(values):
    given_values = np.array(values, np.float32)
    tiny = float(np.finfo(np.float32).tiny)  # below it float32 itself rounds the scaled values
    for name in ("float32", "float16", "int8"):
        payload, scale = write_values(name, given_values)
        off = np.abs(read_values(name, payload, scale).astype(np.float64) - given_values.astype(np.float64))
        size = np.abs(given_values.astype(np.float64))
        bound = {
            "float32": 0 * size,
            "float16": 2.0**-11 * size + 2.0**-25 * scale + tiny,
            "int8": 0 * size + scale * (1 / 254 + 2.0**-22) + tiny,
        }[name]
        assert (off <= bound).all(), name


def test_labels_come_back_and_those_that_do_not_fit_are_refused():
    assert (label_type(10), label_type(256), label_type(257)) == ("uint8", "uint8", "uint16")
    assert read_values("uint16", *write_values("uint16", np.array([0, 65535]))).tolist() == [0, 65535]
    for labels in ([256], [-1]):
        with pytest.raises(InputError, match="must fit in uint8"):
            write_values("uint8", np.array(labels))
    with pytest.raises(InputError, match="classes"):
        label_type(70000)


def test_what_is_not_finite_does_not_cross():
    for value in (np.nan, np.inf):
        with pytest.raises(InputError, match="diverged"):
            write_values("float16", np.array([value]))


def packet(index="elias-fano", value_type="float16", rows=4, width=50, kept=5):
    rng = np.random.default_rng(3)
    positions = np.sort(rng.choice(width, (rows, kept)) * 0 + np.argsort(rng.random((rows, width)))[:, :kept])
    flat = (positions + np.arange(rows)[:, None] * width).reshape(-1)
    count = rows * width if index == "dense" else rows * kept
    return CutPacket(
        device=7,
        step=9,
        rows=rows,
        width=width,
        index=index,
        value_type=value_type,
        values=rng.integers(0, 9, count).astype(np.float32),
        positions=None if index in ("dense", "support") else flat,
        is_even=index not in ("dense", "support"),
    )


@pytest.mark.parametrize("index", ["dense", "support", *INDEX_CODES])
@pytest.mark.parametrize("value_type", ["float32", "float16", "int8", "uint8"])
def test_a_packet_comes_back_and_takes_what_was_said(index, value_type):
    sent = packet(index, value_type)
    message, sizes = write_packet(sent)
    got = read_packet(message, width=50, max_rows=4, kept=20)
    assert (got.device, got.step, got.rows, got.width, got.index) == (7, 9, 4, 50, index)
    # int8 steps by 8 / 127 here, half a step is 0.032.
    assert np.abs(got.values - sent.values).max() <= (0.032 if value_type == "int8" else 0)
    assert (got.positions is None) == (index in ("dense", "support"))
    if got.positions is not None:
        assert np.array_equal(got.positions, sent.positions)
    assert len(message) == sizes.total
    if index != "rice":
        space = IndexSpace(4, 50, len(sent.values), index not in ("dense", "support"))
        assert message_sizes(index, value_type, space) == sizes


def test_every_cut_and_every_flipped_bit_is_refused():
    message, _ = write_packet(packet())
    for end in range(len(message)):
        with pytest.raises(InputError):
            read_packet(message[:end], width=50, max_rows=4)
    with pytest.raises(InputError, match="send it again"):
        read_packet(message + b"\0", width=50, max_rows=4)
    for bit in range(8 * len(message)):
        damaged = bytearray(message)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InputError):
            read_packet(damaged, width=50, max_rows=4)


def signed(message: bytearray) -> bytes:
    """The message with the checksum that its bytes give: what an attacker would send."""
    end = FRAMING_BYTES - 4
    checksum = zlib.crc32(message[FRAMING_BYTES:], zlib.crc32(message[:end]))
    return bytes(message[:end]) + struct.pack("<I", checksum) + bytes(message[FRAMING_BYTES:])


@pytest.mark.parametrize("index", ["dense", "support", *INDEX_CODES])
@given(data=st.data())
def test_bytes_with_a_right_checksum_are_read_as_written_or_refused(index, data):
    message = bytearray(write_packet(packet(index))[0])
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    hostile = signed(message)
    try:
        got = read_packet(hostile, width=50, max_rows=4, kept=20)
    except InputError:
        return
    # What is accepted is what would be written, but for the scale, which has more forms than are written.
    again, _ = write_packet(got)
    assert again[:28] == hostile[:28]
    assert got.rows <= 4


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(noise):
    with pytest.raises(InputError):
        read_packet(noise, width=50, max_rows=4)


def test_announced_sizes_are_checked_before_anything_is_allocated(monkeypatch):
    message = bytearray(write_packet(packet())[0])

    def announcing(offset, value):
        changed = bytearray(message)
        struct.pack_into("<I", changed, offset, value)
        return signed(changed)

    monkeypatch.setattr(packets, "read_index", lambda *_: pytest.fail("was read"))
    monkeypatch.setattr(packets, "read_values", lambda *_: pytest.fail("was read"))
    cases = {
        "at most 4 samples": announcing(16, 2**32 - 1),
        "Wanted 50 elements": announcing(20, 2**32 - 1),
        "cannot be kept": announcing(24, 2**32 - 1),
        "send it again": announcing(32, 2**32 - 1),
        "are not": announcing(24, 21),
    }
    for said, hostile in cases.items():
        with pytest.raises(InputError, match=said):
            read_packet(hostile, width=50, max_rows=4)
    for said, change in {"something else": (0, b"X"), "version": (4, b"\2")}.items():
        changed = bytearray(message)
        changed[change[0] : change[0] + 1] = change[1]
        with pytest.raises(InputError, match=said):
            read_packet(signed(changed), width=50, max_rows=4)


def test_unknown_codes_are_named():
    with pytest.raises(UsageError, match="Did you mean 'rice'"):
        index_bytes("ricee", IndexSpace(1, 1, 1))
    with pytest.raises(UsageError, match="value type"):
        write_values("float17", np.zeros(1))


def test_encodings_and_sizes_import_no_torch():
    code = (
        "import sys, capstan.federation.packets, capstan.federation.sparsifiers, capstan.federation.traffic;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
