"""What crosses the cut, as one message: checked, never trusted. NumPy only.

    magic "CFED" | version u16 | index code u8 | value type u8 | device u32 | step u32 | rows u32 | width u32
    | kept u32 | scale f32 | index bytes u32 | value bytes u32 | CRC-32 of all else u32 | index | values

Little-endian, 44 bytes before the payload. Of the index codes two write nothing: `dense` says that all
elements are there, `support` that they are those of the packet that this one answers, in its order.
"""

import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capstan.errors import InputError, unknown_name
from capstan.federation.index_codes import (
    INDEX_CODES,
    IndexSpace,
    Positions,
    expected_index_bytes,
    index_bytes,
    read_index,
    write_index,
)
from capstan.federation.value_codes import VALUE_TYPES, read_values, value_bytes, write_values

MAGIC = b"CFED"
VERSION = 1
_HEADER = struct.Struct("<4sHBBIIIIIfII")
_CHECKSUM = struct.Struct("<I")
FRAMING_BYTES = _HEADER.size + _CHECKSUM.size
DENSE, SUPPORT = "dense", "support"
_INDEX_NAMES = (DENSE, SUPPORT, *INDEX_CODES)
_VALUE_NAMES = tuple(VALUE_TYPES)
_EVEN = 0x80  # of the index code: every row keeps equally many


@dataclass(frozen=True, kw_only=True, eq=False)
class CutPacket:
    """Elements of a (rows, width) tensor: all of them, or those at `positions`, rising and flat.

    `positions` is None where all are there (`dense`) or where the receiver has them already (`support`).
    Where the sender promises equally many in each row (`is_even`), positions can be packed in fewer bits.
    """

    device: int
    step: int
    rows: int
    width: int
    index: str
    value_type: str
    values: NDArray[Any]
    positions: Positions | None = field(default=None)
    is_even: bool = False


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a message takes, by what its bytes are."""

    index: int
    values: int
    framing: int = FRAMING_BYTES

    @property
    def total(self) -> int:
        return self.index + self.values + self.framing


def message_sizes(index: str, value_type: str, space: IndexSpace) -> Sizes:
    """The size of a message: exact where `is_size_known`, else what is expected of random positions."""
    coded = 0 if index in (DENSE, SUPPORT) else expected_index_bytes(index, space)
    return Sizes(index=coded, values=value_bytes(value_type, space.kept))


def is_size_known(index: str, space: IndexSpace) -> bool:
    """Whether counts alone decide the size."""
    return index in (DENSE, SUPPORT) or index_bytes(index, space) is not None


def write_packet(packet: CutPacket) -> tuple[bytes, Sizes]:
    """The message, and what its bytes are."""
    kept = len(packet.values)
    coded = np.empty(0, np.uint8)
    if packet.index not in _INDEX_NAMES:
        raise unknown_name("index code", packet.index, _INDEX_NAMES)
    if packet.index not in (DENSE, SUPPORT):
        if packet.positions is None:
            raise InputError(f"The index code {packet.index} writes positions, found none.")
        space = IndexSpace(packet.rows, packet.width, kept, packet.is_even)
        coded = write_index(packet.index, packet.positions, space)
    values, scale = write_values(packet.value_type, packet.values)
    header = _HEADER.pack(
        MAGIC,
        VERSION,
        _INDEX_NAMES.index(packet.index) | (_EVEN if packet.is_even else 0),
        _VALUE_NAMES.index(packet.value_type),
        packet.device,
        packet.step,
        packet.rows,
        packet.width,
        kept,
        scale,
        len(coded),
        len(values),
    )
    payload = coded.tobytes() + values.tobytes()
    checksum = _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(header)))
    return b"".join((header, checksum, payload)), Sizes(index=len(coded), values=len(values))


def sizes_of(message: bytes) -> Sizes:
    """What the bytes of a message are that `write_packet` wrote or `read_packet` took."""
    *_, coded, valued = _HEADER.unpack_from(message)
    return Sizes(index=coded, values=valued)


def read_packet(
    message: bytes | bytearray | memoryview, *, width: int, max_rows: int, kept: int | None = None
) -> CutPacket:
    """The packet of one message, whole.

    `width` is the width of the cut and `max_rows` the largest batch that may come; `kept` is how many values
    answer a support that the receiver has. All announced sizes are checked against them and against the
    bytes that are there before anything is allocated, and memory in proportion to those bytes is allocated.

    Raises:
        InputError: `write_packet` would not write this message, or it is not for this cut.
    """
    buffer = memoryview(message).cast("B")
    if len(buffer) < FRAMING_BYTES:
        raise InputError(f"A packet has at least {FRAMING_BYTES} bytes, found {len(buffer)}: it was cut off.")
    magic, version, index_id, value_id, device, step, rows, found_width, count, scale, coded, valued = (
        _HEADER.unpack_from(buffer)
    )
    if magic != MAGIC:
        raise InputError(f"A packet begins with {MAGIC!r}, found {magic!r}: this is something else.")
    if version != VERSION:
        raise InputError(f"Wanted packet version {VERSION}, found {version}: update the older side.")
    if len(buffer) != FRAMING_BYTES + coded + valued:
        raise InputError(
            f"{FRAMING_BYTES + coded + valued} bytes are announced, found {len(buffer)}: send it again."
        )
    payload = buffer[FRAMING_BYTES:]
    announced = _CHECKSUM.unpack_from(buffer, _HEADER.size)[0]
    checksum = zlib.crc32(payload, zlib.crc32(buffer[: _HEADER.size]))
    if checksum != announced:
        raise InputError(f"The checksum is {announced:08x}, the bytes give {checksum:08x}: send it again.")
    is_even = bool(index_id & _EVEN)
    if index_id & ~_EVEN >= len(_INDEX_NAMES) or value_id >= len(_VALUE_NAMES):
        raise InputError(f"Index code {index_id} or value type {value_id} is unknown: update the older side.")
    index, value_type = _INDEX_NAMES[index_id & ~_EVEN], _VALUE_NAMES[value_id]
    _check_sizes(rows, found_width, count, width=width, max_rows=max_rows)
    wanted = {DENSE: rows * found_width, SUPPORT: kept}.get(index, count)
    if count != wanted:
        raise InputError(f"Wanted {wanted} values in a {index} packet, found {count}.")
    if valued != value_bytes(value_type, count):
        raise InputError(f"{count} values of {value_type} are not {valued} bytes.")
    flat = np.frombuffer(payload, np.uint8)
    positions = None
    if index in (DENSE, SUPPORT):
        if coded or is_even:
            raise InputError(f"A {index} packet has no index, found {coded} bytes of one.")
    else:
        if is_even and (rows == 0 or count == 0 or count % rows):
            raise InputError(f"{count} positions cannot be spread evenly over {rows} rows.")
        positions = read_index(index, flat[:coded], IndexSpace(rows, found_width, count, is_even))
    return CutPacket(
        device=device,
        step=step,
        rows=rows,
        width=found_width,
        index=index,
        value_type=value_type,
        values=read_values(value_type, flat[coded:], scale),
        positions=positions,
        is_even=is_even,
    )


def _check_sizes(rows: int, found_width: int, count: int, *, width: int, max_rows: int) -> None:
    if found_width != width:
        raise InputError(f"Wanted {width} elements a sample at this cut, found {found_width}.")
    if rows > max_rows:
        raise InputError(f"Wanted at most {max_rows} samples in a batch, found {rows}.")
    if count > rows * found_width:
        raise InputError(f"{count} of {rows * found_width} elements cannot be kept.")
