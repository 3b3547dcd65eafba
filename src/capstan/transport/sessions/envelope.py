"""What a message of a session is wrapped in: checked, never trusted.

    magic "CSES" | version u16 | kind u16 | number u64 | payload bytes u64 | CRC-32 of all else u32 | payload

Little-endian, 28 bytes before the payload.
"""

import struct
import zlib
from enum import IntEnum
from typing import NamedTuple

from capstan.errors import InputError

MAGIC, VERSION = b"CSES", 1
_HEADER = struct.Struct("<4sHHQQ")
_CHECKSUM = struct.Struct("<I")
ENVELOPE_BYTES = _HEADER.size + _CHECKSUM.size


class Kind(IntEnum):
    """What a message is."""

    REQUEST = 1
    ANSWER = 2
    REFUSAL = 3  # the payload says why, in UTF-8


class Envelope(NamedTuple):
    """A message, and the number of the request that it is or answers; numbers begin at 1."""

    kind: Kind
    number: int
    payload: bytes


def seal(envelope: Envelope) -> bytes:
    """The message as it crosses."""
    header = _HEADER.pack(MAGIC, VERSION, envelope.kind, envelope.number, len(envelope.payload))
    checksum = zlib.crc32(envelope.payload, zlib.crc32(header))
    return b"".join((header, _CHECKSUM.pack(checksum), envelope.payload))


def unseal(message: bytes, *, sender: str) -> Envelope:
    """The envelope of one message, whole.

    Raises:
        InputError: `seal` would not write this message. Names the `sender`.
    """
    if len(message) < ENVELOPE_BYTES:
        raise InputError(
            f"A message of {sender} has at least {ENVELOPE_BYTES} bytes, found {len(message)}: it is cut off."
        )
    magic, version, kind, number, announced = _HEADER.unpack_from(message)
    if magic != MAGIC:
        raise InputError(
            f"A message begins with {MAGIC!r}; {sender} sent {magic!r}: it is no Capstan session."
        )
    if version != VERSION:
        raise InputError(f"Wanted session version {VERSION}, {sender} has {version}: update the older side.")
    payload = message[ENVELOPE_BYTES:]
    if len(payload) != announced:
        raise InputError(f"{sender} announced {announced} bytes and sent {len(payload)}: it is cut off.")
    (wanted,) = _CHECKSUM.unpack_from(message, _HEADER.size)
    checksum = zlib.crc32(payload, zlib.crc32(message[: _HEADER.size]))
    if checksum != wanted:
        raise InputError(f"The checksum of {sender} is {wanted:08x}, its bytes give {checksum:08x}.")
    if kind not in set(Kind) or number < 1:
        raise InputError(
            f"{sender} sent kind {kind}, number {number}: kinds are 1 to {len(Kind)}, numbers from 1."
        )
    return Envelope(Kind(kind), number, payload)
