"""A packet: encoded bytes and what is needed to decode them. On the wire it is checked, never trusted."""

import math
import struct
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from capstan.codecs.dtypes import dtype_from_name, dtype_name
from capstan.codecs.names import codec_from_name
from capstan.errors import InputError, UsageError

MAGIC = b"CPKT"
VERSION = 1
_PREFIX = struct.Struct("<4sHIQ")  # magic, version, header bytes, payload bytes
_CHECKSUM = struct.Struct("<I")
_MAX_ELEMENTS = 2**62  # torch counts elements and strides in signed 64-bit integers


@dataclass(frozen=True, kw_only=True, eq=False)
class Packet:
    """An encoded tensor: the codec's name, the tensor's shape and type, and the bytes.

    The payload is flat uint8, on the device where it was encoded. It may be a view of a slab; then the
    packet is valid until the slab is written again.
    """

    codec: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    payload: Tensor

    def to_bytes(self) -> bytes:
        """The packet as one message; `from_bytes` inverts it. The layout is in docs/codecs.md."""
        header = _pack_header(self)
        payload = self.payload.contiguous().cpu().numpy().data
        prefix = _PREFIX.pack(MAGIC, VERSION, len(header), len(payload))
        checksum = _CHECKSUM.pack(_checksum(prefix, header, payload))
        return b"".join((prefix, checksum, header, payload))

    @classmethod
    def from_bytes(cls, buffer: bytes | bytearray | memoryview) -> "Packet":
        """Read one message, all of it; anything that `to_bytes` would not write raises `InputError`.

        Nothing is allocated before every length is checked against the bytes that are there. The payload is
        copied once, so that the packet does not depend on the buffer.
        """
        header, payload = _open_envelope(memoryview(buffer).cast("B"))
        fields = _unpack_header(bytes(header))
        _check_size(fields, len(payload))
        return cls(codec=fields.codec, shape=fields.shape, dtype=fields.dtype, payload=_owned_tensor(payload))


class _Header(NamedTuple):
    codec: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def _checksum(prefix: bytes, header: bytes | memoryview, payload: memoryview) -> int:
    return zlib.crc32(payload, zlib.crc32(header, zlib.crc32(prefix)))


def _pack_header(packet: Packet) -> bytes:
    names = (packet.codec.encode("ascii"), dtype_name(packet.dtype).encode("ascii"))
    sizes = struct.pack(f"<B{len(packet.shape)}Q", len(packet.shape), *packet.shape)
    return b"".join((*(bytes((len(name),)) + name for name in names), sizes))


def _open_envelope(buffer: memoryview) -> tuple[memoryview, memoryview]:
    start = _PREFIX.size + _CHECKSUM.size
    if len(buffer) < start:
        raise InputError(f"A packet has at least {start} bytes, found {len(buffer)}: it was cut off.")
    magic, version, header_bytes, payload_bytes = _PREFIX.unpack_from(buffer)
    if magic != MAGIC:
        raise InputError(f"A packet begins with {MAGIC!r}, found {magic!r}: this is something else.")
    if version != VERSION:
        raise InputError(f"Wanted packet version {VERSION}, found {version}: update the older side.")
    wanted = start + header_bytes + payload_bytes
    if len(buffer) != wanted:
        raise InputError(f"The packet announces {wanted} bytes, found {len(buffer)}: send it again.")
    header, payload = buffer[start : start + header_bytes], buffer[start + header_bytes :]
    (announced,) = _CHECKSUM.unpack_from(buffer, _PREFIX.size)
    found = _checksum(bytes(buffer[: _PREFIX.size]), header, payload)
    if found != announced:
        raise InputError(
            f"The packet's checksum is {announced:08x}, its bytes give {found:08x}: send it again."
        )
    return header, payload


def _unpack_header(header: bytes) -> _Header:
    try:
        codec, offset = _unpack_name(header, 0)
        dtype, offset = _unpack_name(header, offset)
        (num_dims,) = struct.unpack_from("<B", header, offset)
        shape = struct.unpack_from(f"<{num_dims}Q", header, offset + 1)
        fields = _Header(codec, dtype_from_name(dtype), shape)
    except (struct.error, UnicodeDecodeError, UsageError) as error:
        raise InputError(f"The packet's header is malformed: {error}") from error
    wanted = offset + 1 + 8 * num_dims
    if len(header) != wanted:
        raise InputError(f"The fields of the packet's header take {wanted} bytes, found {len(header)}.")
    return fields


def _unpack_name(header: bytes, offset: int) -> tuple[str, int]:
    (size,) = struct.unpack_from("<B", header, offset)
    (name,) = struct.unpack_from(f"<{size}s", header, offset + 1)
    return name.decode("ascii"), offset + 1 + size


def _check_size(fields: _Header, payload_bytes: int) -> None:
    # A size of 0 hides the others from the product, not from the strides.
    if math.prod(max(1, size) for size in fields.shape) > _MAX_ELEMENTS:
        raise InputError(f"A packet holds at most {_MAX_ELEMENTS} elements, found the shape {fields.shape}.")
    try:
        codec = codec_from_name(fields.codec)
    except UsageError as error:
        raise InputError(f"The packet's codec is unknown: {error}") from error
    if codec.name != fields.codec:
        raise InputError(f"Wanted the codec's canonical name {codec.name!r}, found {fields.codec!r}.")
    wanted = codec.encoded_bytes(fields.shape, fields.dtype)
    if wanted != payload_bytes:
        raise InputError(
            f"{codec.name} encodes {dtype_name(fields.dtype)} of shape {fields.shape} in {wanted} bytes, "
            f"found {payload_bytes}."
        )


def _owned_tensor(payload: memoryview) -> Tensor:
    # frombuffer refuses zero bytes.
    return (
        torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        if payload
        else torch.empty(0, dtype=torch.uint8)
    )
