"""Which elements of a tensor were kept, in few bits. NumPy only: a device needs no torch to write these.

Of n elements k are kept, at rising positions p_0 < p_1 < …. Sizes in bits, each stream padded to a byte:

    bitmap       n
    packed       k ceil(log2 n)          or k ceil(log2 d) where each of the rows of d keeps equally many
    elias-fano   k (w + 1) + floor((n - k) / 2^w),                     w = floor(log2(n / k))
    rice         k (b + 1) + sum floor((p_i - p_{i-1} - 1) / 2^b),     p_{-1} = -1

The size of the first three depends on counts alone, so that what a step sends is known before it runs. Rice
codes the gaps and is the smallest where they are random, but its size is known only afterwards: at most that
of Elias-Fano with w = b, and on average what `expected_bytes` says.

Source: Elias, "Efficient storage and retrieval by content and address of static files" (1974); Rice and
Plaunt, "Adaptive variable-length coding" (1971). Differs: Elias-Fano codes p_i - i, which cannot fall as the
positions rise, and is thereby k / 2^w bits shorter; Rice's unary and binary parts are two streams, so that
both are read without a loop.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from capstan.errors import InputError, unknown_name

Positions = NDArray[np.int64]
Bytes = NDArray[np.uint8]


class IndexSpace(NamedTuple):
    """Where `kept` positions lie: below `rows * width`, in each row equally many if `is_even`."""

    rows: int
    width: int
    kept: int
    is_even: bool = False

    @property
    def limit(self) -> int:
        """Positions are below it."""
        return self.rows * self.width

    @property
    def field(self) -> int:
        """A packed position is a number below it."""
        return self.width if self.is_even else self.limit


class IndexCode(NamedTuple):
    """One way to write positions. `least_bytes` and `most_bytes` are equal where counts decide the size."""

    write: Callable[[Positions, IndexSpace], Bytes]
    read: Callable[[Bytes, IndexSpace], Positions]
    least_bytes: Callable[[IndexSpace], int]
    most_bytes: Callable[[IndexSpace], int]


def code_from_name(name: str) -> IndexCode:
    """The code called `name`; an unknown name raises `UsageError`."""
    if name not in INDEX_CODES:
        raise unknown_name("index code", name, INDEX_CODES)
    return INDEX_CODES[name]


def write_index(name: str, positions: Positions, space: IndexSpace) -> Bytes:
    """Rising `positions` in `space` as bytes."""
    code = code_from_name(name)
    _check(positions, space)
    return code.write(positions, space) if space.kept else np.empty(0, np.uint8)


def read_index(name: str, payload: Bytes, space: IndexSpace) -> Positions:
    """The inverse of `write_index`. Memory in proportion to the payload and to `space.kept` is allocated.

    Raises:
        InputError: `write_index` would not write these bytes.
    """
    code = code_from_name(name)
    least, most = code.least_bytes(space), code.most_bytes(space)
    if not least <= len(payload) <= most:
        raise InputError(
            f"{space.kept} positions below {space.limit} take {_range(least, most)} bytes in the code "
            f"{name}, found {len(payload)}: the packet is damaged."
        )
    if not space.kept:
        return np.empty(0, np.int64)
    positions = code.read(payload, space)
    _check(positions, space)
    if not np.array_equal(code.write(positions, space), payload):
        raise InputError(f"These bytes are not what the code {name} writes: the packet is damaged.")
    return positions


def index_bytes(name: str, space: IndexSpace) -> int | None:
    """The exact size of an index in the code `name`, or None where it depends on the positions."""
    code = code_from_name(name)
    least, most = code.least_bytes(space), code.most_bytes(space)
    return most if least == most else None


def most_index_bytes(name: str, space: IndexSpace) -> int:
    """What an index in the code `name` takes at most."""
    return code_from_name(name).most_bytes(space)


def expected_index_bytes(name: str, space: IndexSpace) -> int:
    """The size of an index in the code `name` where each set of positions is equally likely, rounded up.

    For Rice the gaps are taken as geometric with p = k / n: k (b + 1 + q^m / (1 - q^m)) bits, q = 1 - p,
    m = 2^b. That is the expectation but for terms of order 1 / k.
    """
    exact = index_bytes(name, space)
    if exact is not None:
        return exact
    low = rice_bits(space)
    unary_bits = space.kept + _expected_quotients(space, low)
    return min(most_index_bytes(name, space), _bytes(space.kept * low) + _bytes(round(unary_bits)))


def rice_bits(space: IndexSpace) -> int:
    """How many low bits of each gap are written as they are: those of the least expected length."""
    return min(
        range(max(1, space.limit.bit_length())),
        key=lambda low: space.kept * low + _expected_quotients(space, low),
    )


def _expected_quotients(space: IndexSpace, low: int) -> float:
    rest = float((1 - space.kept / space.limit) ** (2**low))
    return space.kept * rest / (1 - rest)


def _range(least: int, most: int) -> str:
    return str(most) if least == most else f"{least} to {most}"


def _bytes(num_bits: int) -> int:
    return -(-num_bits // 8)


def _check(positions: Positions, space: IndexSpace) -> None:
    if len(positions) != space.kept:
        raise InputError(f"Wanted {space.kept} positions, found {len(positions)}.")
    if not space.kept:
        return
    if positions[0] < 0 or positions[-1] >= space.limit or bool((np.diff(positions) <= 0).any()):
        raise InputError(f"Wanted rising positions below {space.limit}, found others.")
    if space.is_even and not np.array_equal(
        positions // space.width, np.repeat(np.arange(space.rows), space.kept // space.rows)
    ):
        raise InputError(f"Wanted {space.kept // space.rows} positions in each of {space.rows} rows.")


# --- fields of equal width -------------------------------------------------------------------------------


def _pack_fields(fields: Positions, num_bits: int) -> Bytes:
    bits = (fields[:, None] >> np.arange(num_bits)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")


def _unpack_fields(payload: Bytes, count: int, num_bits: int) -> Positions:
    bits = np.unpackbits(payload, count=count * num_bits, bitorder="little").reshape(count, num_bits)
    fields = np.zeros(count, np.int64)
    for bit in range(num_bits):
        fields |= bits[:, bit].astype(np.int64) << bit
    return fields


def _ones(payload: Bytes, count: int) -> Positions:
    found = np.flatnonzero(np.unpackbits(payload, bitorder="little"))
    if len(found) != count:
        raise InputError(f"Wanted {count} positions, found {len(found)}: the packet is damaged.")
    return found.astype(np.int64)


def _marked(marks: Positions, num_bits: int) -> Bytes:
    bits = np.zeros(num_bits, np.uint8)
    bits[marks] = 1
    return np.packbits(bits, bitorder="little")


# --- the codes -------------------------------------------------------------------------------------------


def _write_bitmap(positions: Positions, space: IndexSpace) -> Bytes:
    return _marked(positions, space.limit)


def _read_bitmap(payload: Bytes, space: IndexSpace) -> Positions:
    return _ones(payload, space.kept)


def _bitmap_bytes(space: IndexSpace) -> int:
    return _bytes(space.limit) if space.kept else 0


def _field_bits(space: IndexSpace) -> int:
    return max(0, space.field - 1).bit_length()


def _write_packed(positions: Positions, space: IndexSpace) -> Bytes:
    return _pack_fields(positions % space.field, _field_bits(space))


def _read_packed(payload: Bytes, space: IndexSpace) -> Positions:
    fields = _unpack_fields(payload, space.kept, _field_bits(space))
    if not space.is_even:
        return fields
    return fields + np.repeat(np.arange(space.rows) * space.width, space.kept // space.rows)


def _packed_bytes(space: IndexSpace) -> int:
    return _bytes(space.kept * _field_bits(space))


def _low_bits(space: IndexSpace) -> int:
    return max(0, (space.limit // space.kept).bit_length() - 1) if space.kept else 0


def _write_elias_fano(positions: Positions, space: IndexSpace) -> Bytes:
    low, order = _low_bits(space), np.arange(space.kept)
    free = positions - order
    high = _marked((free >> low) + order, space.kept + ((space.limit - space.kept) >> low))
    return np.concatenate((_pack_fields(free & ((1 << low) - 1), low), high))


def _read_elias_fano(payload: Bytes, space: IndexSpace) -> Positions:
    low, order, split = _low_bits(space), np.arange(space.kept), _bytes(space.kept * _low_bits(space))
    high = _ones(payload[split:], space.kept) - order
    return (high << low) + _unpack_fields(payload[:split], space.kept, low) + order


def _elias_fano_bytes(space: IndexSpace) -> int:
    low = _low_bits(space)
    return _bytes(space.kept * low) + _bytes(
        space.kept + ((space.limit - space.kept) >> low) if space.kept else 0
    )


def _write_rice(positions: Positions, space: IndexSpace) -> Bytes:
    low = rice_bits(space)
    gaps = np.diff(positions, prepend=-1) - 1
    ends = np.cumsum((gaps >> low) + 1) - 1
    return np.concatenate((_pack_fields(gaps & ((1 << low) - 1), low), _marked(ends, int(ends[-1]) + 1)))


def _read_rice(payload: Bytes, space: IndexSpace) -> Positions:
    low = rice_bits(space)
    split = _bytes(space.kept * low)
    quotients = np.diff(_ones(payload[split:], space.kept), prepend=-1) - 1
    gaps = (quotients << low) + _unpack_fields(payload[:split], space.kept, low)
    return np.cumsum(gaps + 1) - 1


def _least_rice_bytes(space: IndexSpace) -> int:
    return _bytes(space.kept * rice_bits(space)) + _bytes(space.kept) if space.kept else 0


def _most_rice_bytes(space: IndexSpace) -> int:
    low = rice_bits(space) if space.kept else 0
    return _bytes(space.kept * low) + _bytes(
        space.kept + ((space.limit - space.kept) >> low) if space.kept else 0
    )


INDEX_CODES = {
    "bitmap": IndexCode(_write_bitmap, _read_bitmap, _bitmap_bytes, _bitmap_bytes),
    "packed": IndexCode(_write_packed, _read_packed, _packed_bytes, _packed_bytes),
    "elias-fano": IndexCode(_write_elias_fano, _read_elias_fano, _elias_fano_bytes, _elias_fano_bytes),
    "rice": IndexCode(_write_rice, _read_rice, _least_rice_bytes, _most_rice_bytes),
}
"""How positions are written, by name."""
