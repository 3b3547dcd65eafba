"""Sizes and durations, from people and for people."""

import re
from contextlib import suppress
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from capstan.errors import UsageError
from capstan.plans import bytes_text, parse_bytes, seconds_text

UNITS = {
    "": 1,
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("64MiB", 64 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("2GB", 2_000_000_000),
        ("16g", 16 * 2**30),
        (" 3 kib ", 3072),
        (".5KiB", 512),
        ("0", 0),
        (0, 0),
        (123_456_789, 123_456_789),
    ],
)
def test_sizes_are_read(text, size_bytes):
    assert parse_bytes(text) == size_bytes


@given(
    st.from_regex(r"[0-9]{1,4}(\.[0-9]{1,6})?", fullmatch=True),
    st.sampled_from(sorted(UNITS)),
    st.sampled_from([str, str.lower, str.upper]),
)
@example("1.001", "kB", str)
def test_decimals_are_exact_and_only_parts_of_a_byte_are_dropped(number, unit, case):
    assert parse_bytes(number + case(unit)) == int(Fraction(number) * UNITS[unit])


@given(st.integers(0, 2**60))
def test_a_plain_number_of_bytes_is_kept_exactly(size_bytes):
    assert parse_bytes(size_bytes) == parse_bytes(str(size_bytes)) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "many",
        "-1",
        -1,
        "1.2.3GiB",
        "1e9",
        "1,000",
        "5 XiB",
        "5 GiB each",
        "nan",
        "inf",
        "٣",
        "1_0",
        True,
    ],
)
def test_anything_else_is_a_usage_error_that_shows_it(text):
    with pytest.raises(UsageError, match=re.escape(repr(str(text)))):
        parse_bytes(text)


def test_a_number_too_long_for_a_float_is_read_or_refused():
    with suppress(UsageError):
        assert parse_bytes("1" * 400) == int("1" * 400)


@given(st.integers(0, 2**50))
def test_bytes_text_reads_back_to_within_half_of_its_last_digit(size_bytes):
    text = bytes_text(size_bytes)
    scale = UNITS[text.split()[1]]
    half_digit = 0 if scale == 1 else scale / 200
    assert abs(parse_bytes(text) - size_bytes) <= half_digit + 1  # parse_bytes drops a part of a byte


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (3 * 2**19, "1.50 MiB"),
        (2**30, "1.00 GiB"),
        (5 * 2**41, "10240.00 GiB"),
        (-(2**20), "-1.00 MiB"),
    ],
)
def test_sizes_are_written(size_bytes, text):
    assert bytes_text(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.00 ms"),
        (0.0612, "61.20 ms"),
        (1.0, "1.00 s"),
        (59.5, "59.50 s"),
        (60.0, "1 min 00 s"),
        (3599.0, "59 min 59 s"),
        (3600.0, "1 h 00 min"),
        (7399.0, "2 h 03 min"),
        (360_000.0, "100 h 00 min"),
    ],
)
def test_durations_are_written(seconds, text):
    assert seconds_text(seconds) == text


_SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}


@given(st.floats(0, 1e7))
def test_seconds_text_reads_back_to_within_its_resolution(seconds):
    parts = re.findall(r"([0-9.]+) (\w+)", seconds_text(seconds))
    read = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if len(parts) == 1:  # rounded to two digits
        assert abs(read - seconds) <= 0.00501 * _SECONDS[parts[0][1]]
    else:  # whole minutes and seconds, or hours and minutes; the rest is dropped
        assert 0 <= seconds - read < _SECONDS[parts[1][1]]
