"""One message is one flat uint8 tensor: a header that says what it is, then the payload, scales and all."""

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from capstan.errors import InputError

HEADER_BYTES = 32
_HEADER = struct.Struct("<4sHBBIIQQ")
_MAGIC, _VERSION = b"CMSG", 2


class Header(NamedTuple):
    """What a message says of itself.

    `source` is the sender's rank, `sequence` counts operations, `step` the exchanges in one. `due_ns` is
    when the message arrives over a shaped link, by the monotonic clock of the machine; 0 over a real one.
    `flags` are eight bits that operations may use: what a sender knows, for whoever receives.
    """

    source: int
    sequence: int
    step: int
    payload_bytes: int
    due_ns: int = 0
    flags: int = 0


def write_header(message: Tensor, header: Header) -> None:
    """Put the header in front of the payload."""
    data = _HEADER.pack(
        _MAGIC,
        _VERSION,
        header.step,
        header.flags,
        header.source,
        header.sequence,
        header.payload_bytes,
        header.due_ns,
    )
    message[:HEADER_BYTES].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def read_header(message: Tensor) -> Header:
    """The header of a message; anything that `write_header` would not write raises `InputError`."""
    data = bytes(message[:HEADER_BYTES].cpu().numpy())
    magic, version, step, flags, source, sequence, payload_bytes, due_ns = _HEADER.unpack(data)
    if magic != _MAGIC or version != _VERSION:
        raise InputError(
            f"A message begins with {_MAGIC!r} and version {_VERSION}, found {magic!r} and {version}: "
            "the other rank runs another Capstan, or sends something else. Update the older side."
        )
    return Header(source, sequence, step, payload_bytes, due_ns, flags)


def check_header(message: Tensor, wanted: Header, *, about: str) -> Header:
    """The header of a message that must be the wanted one but for when it is due."""
    found = read_header(message)
    if found[:4] != wanted[:4]:
        raise InputError(
            f"Wanted from rank {wanted.source} ({about}) operation {wanted.sequence}, step {wanted.step}, "
            f"{wanted.payload_bytes} bytes; found {found.sequence}, {found.step}, {found.payload_bytes} "
            f"of rank {found.source}. Ranks must run the same operations in the same order."
        )
    return found
