"""Which bucket a key belongs to: Iceberg's murmur3, so that other engines agree about it.

    bucket = (murmur3_x86_32(bytes of the key) & 0x7fffffff) % num_buckets

Source: Apache Iceberg table spec, appendix B.
Differs: Iceberg has no buckets of floats, and hashes a decimal with its scale. Here numbers that Python calls
equal (1, 1.0, True, Decimal("1.00")) share a bucket; tuples are hashed by their parts.
"""

import datetime
import math
import struct
from decimal import Decimal
from uuid import UUID

from capstan.errors import InputError

HASH = "iceberg.murmur3_x86_32"
NULL_BUCKET = 0
_MASK = 0xFFFFFFFF
_EPOCH = datetime.datetime(1970, 1, 1)
_EPOCH_UTC = _EPOCH.replace(tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)


class _NotANumber:
    """Stands for every NaN: as in Spark and DuckDB, keys that are NaN are equal."""

    def __repr__(self) -> str:
        return "nan"


NAN = _NotANumber()


def murmur3(data: bytes, seed: int = 0) -> int:
    """MurmurHash3 x86 32, as a signed number."""
    state = seed
    whole = len(data) & ~3
    for (block,) in struct.iter_unpack("<I", data[:whole]):
        block = block * 0xCC9E2D51 & _MASK
        block = (block << 15 | block >> 17) & _MASK
        state ^= block * 0x1B873593 & _MASK
        state = (state << 13 | state >> 19) & _MASK
        state = (state * 5 + 0xE6546B64) & _MASK
    if tail := int.from_bytes(data[whole:], "little"):
        tail = tail * 0xCC9E2D51 & _MASK
        tail = (tail << 15 | tail >> 17) & _MASK
        state ^= tail * 0x1B873593 & _MASK
    state ^= len(data)
    state = (state ^ state >> 16) * 0x85EBCA6B & _MASK
    state = (state ^ state >> 13) * 0xC2B2AE35 & _MASK
    state ^= state >> 16
    return state - (state >> 31 << 32)


def bucket_of(key: object, num_buckets: int) -> int:
    """The bucket of a key; None goes to the first."""
    if key is None:
        return NULL_BUCKET
    return (murmur3(_encode(key)) & 0x7FFFFFFF) % num_buckets


def comparable(key: object) -> object:
    """The key so that equal ones are `==`, NaN too."""
    if isinstance(key, tuple):
        return tuple(map(comparable, key))
    if isinstance(key, float | Decimal) and key != key:
        return NAN
    return key


def is_null(key: object) -> bool:
    """Whether a key joins with nothing: None, or a tuple that holds it."""
    return key is None or (isinstance(key, tuple) and any(map(is_null, key)))


def _encode(key: object) -> bytes:
    match key:
        case bool() | int():
            number = int(key)
            if -(2**63) <= number < 2**63:
                return number.to_bytes(8, "little", signed=True)
            return str(number).encode()
        case float() | Decimal():
            return _encode_number(key)
        case _NotANumber():
            return struct.pack("<d", math.nan)
        case str():
            return key.encode("utf-8", "surrogatepass")
        case bytes():
            return key
        case UUID():
            return key.bytes
        case datetime.datetime():
            epoch = _EPOCH if key.tzinfo is None else _EPOCH_UTC
            return _encode((key - epoch) // _MICROSECOND)
        case datetime.date():
            return _encode(key.toordinal() - _EPOCH.toordinal())
        case datetime.time():
            seconds = (key.hour * 60 + key.minute) * 60 + key.second
            return _encode(seconds * 1_000_000 + key.microsecond)
        case tuple():
            parts = [b"" if part is None else _encode(part) for part in key]
            return b"".join(len(part).to_bytes(4, "little") + part for part in parts)
        case _:
            raise InputError(
                f"A key is a {type(key).__name__}; return a number, text, bytes, "
                "a date, a time, a UUID, or a tuple of these."
            )


def _encode_number(key: float | Decimal) -> bytes:
    if math.isfinite(key) and key == int(key):
        return _encode(int(key))
    return struct.pack("<d", math.nan if key != key else float(key))
