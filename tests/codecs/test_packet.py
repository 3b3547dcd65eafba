"""Packets on the wire: an exact round trip, a fixed layout, and nothing believed without a check."""

import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.codecs import Packet, codec_from_name
from capstan.codecs.dtypes import DTYPE_NAMES, dtype_from_name
from capstan.errors import InputError

NAMES = ["identity", "cast:bfloat16", "group4:5", "group3:4:symmetric:stochastic:float32:dim0"]
START = struct.calcsize("<4sHIQI")


def example(name: str = "group4:5") -> Packet:
    return codec_from_name(name).encode(torch.arange(21.0).view(3, 7), seed=1)


def forged(
    *, codec: bytes, dtype: bytes, shape: list[int], payload: bytes, magic=b"CPKT", version=1, more=b""
) -> bytes:
    """A message written from the description of the layout, with a right checksum whatever it holds."""
    sizes = struct.pack(f"<B{len(shape)}Q", len(shape), *shape)
    header = bytes([len(codec)]) + codec + bytes([len(dtype)]) + dtype + sizes + more
    prefix = struct.pack("<4sHIQ", magic, version, len(header), len(payload))
    return prefix + struct.pack("<I", zlib.crc32(prefix + header + payload)) + header + payload


def _same(one: Packet, other: Packet) -> bool:
    fields = (one.codec, one.shape, one.dtype) == (other.codec, other.shape, other.dtype)
    return fields and torch.equal(one.payload, other.payload)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.sampled_from([bytes, bytearray, memoryview]),
)
def test_from_bytes_inverts_to_bytes(name, shape, kind):
    packet = codec_from_name(name).encode(torch.ones(shape, dtype=torch.float16), seed=1)
    assert _same(Packet.from_bytes(kind(packet.to_bytes())), packet)


@pytest.mark.parametrize("name", DTYPE_NAMES)
def test_every_element_type_crosses(name):
    packet = codec_from_name("identity").encode(torch.ones(3, 2).to(dtype_from_name(name)))
    assert _same(Packet.from_bytes(packet.to_bytes()), packet)


def test_the_layout_is_the_documented_one():
    packet = example()
    payload = packet.payload.numpy().tobytes()
    assert packet.to_bytes() == forged(codec=b"group4:5", dtype=b"float32", shape=[3, 7], payload=payload)


def test_a_packet_does_not_depend_on_the_buffer_it_was_read_from():
    buffer = bytearray(example().to_bytes())
    packet = Packet.from_bytes(buffer)
    buffer[:] = bytes(len(buffer))
    assert _same(packet, example())


def test_a_payload_inside_a_slab_is_written_alone():
    slab = torch.zeros(1000, dtype=torch.uint8)
    payload = example().payload
    slab[3 : 3 + len(payload)] = payload
    inside = Packet(codec="group4:5", shape=(3, 7), dtype=torch.float32, payload=slab[3 : 3 + len(payload)])
    assert inside.to_bytes() == example().to_bytes()


def test_every_truncation_is_refused():
    message = example().to_bytes()
    for size in range(len(message)):
        with pytest.raises(InputError):
            Packet.from_bytes(message[:size])


def test_trailing_bytes_are_refused():
    with pytest.raises(InputError, match=r"announces \d+ bytes, found \d+"):
        Packet.from_bytes(example().to_bytes() + b"\0")


def test_every_flipped_bit_is_refused():
    message = example().to_bytes()
    for position in range(8 * len(message)):
        damaged = bytearray(message)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(InputError):
            Packet.from_bytes(damaged)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80), st.booleans())
def test_random_bytes_are_refused(noise, with_prefix):
    with pytest.raises(InputError):
        Packet.from_bytes(example().to_bytes()[:START] + noise if with_prefix else noise)


@settings(max_examples=300, deadline=None)
@given(
    codec=st.sampled_from([b"identity", b"group4:5", b"group2:1:dim1", b"cast:float16"])
    | st.binary(max_size=12),
    dtype=st.sampled_from([b"float32", b"float16", b"bool"]) | st.binary(max_size=8),
    shape=st.lists(st.integers(0, 4) | st.integers(0, 2**64 - 1), max_size=5),
    payload=st.binary(max_size=40),
    more=st.just(b"") | st.binary(max_size=3),
)
def test_a_forged_message_with_a_right_checksum_is_refused_or_decodes(codec, dtype, shape, payload, more):
    message = forged(codec=codec, dtype=dtype, shape=shape, payload=payload, more=more)
    try:
        packet = Packet.from_bytes(message)
    except InputError:
        return
    assert codec_from_name(packet.codec).decode(packet).shape == packet.shape


GOOD = {"codec": b"identity", "dtype": b"float32", "shape": [2, 3], "payload": bytes(24)}


def test_the_forger_can_write_what_is_accepted():
    assert Packet.from_bytes(forged(**GOOD)).shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magic": b"GGUF"}, "begins with b'CPKT', found b'GGUF'"),
        ({"version": 2}, "version 1, found 2"),
        ({"codec": b"identiti"}, "Did you mean 'identity'"),
        ({"codec": b"group4"}, "canonical name 'group4:64', found 'group4'"),
        ({"codec": b"group4:0"}, "group_size must be at least 1, found 0"),
        ({"codec": b"group4:8:dim2", "payload": bytes(8)}, "groups along dim 2"),
        ({"codec": b"\xff"}, "malformed"),
        ({"dtype": b"float33"}, "Did you mean 'float32'"),
        ({"dtype": b"bool", "codec": b"cast:float16"}, "floating-point values, found bool"),
        ({"shape": [2, 4]}, "in 32 bytes, found 24"),
        ({"shape": [2**40, 2**40]}, "at most"),
        ({"shape": [0, 2**62, 2**62], "payload": b""}, "at most"),
        ({"shape": [2**62], "payload": b""}, "bytes, found 0"),
        ({"payload": bytes(23)}, "in 24 bytes, found 23"),
        ({"more": b"\0"}, "take 34 bytes, found 35"),
    ],
)
def test_a_wrong_field_is_refused_with_what_was_wanted_and_found(change, message):
    with pytest.raises(InputError, match=message):
        Packet.from_bytes(forged(**{**GOOD, **change}))


def test_a_length_that_is_not_there_is_refused_before_anything_is_allocated():
    prefix = struct.pack("<4sHIQ", b"CPKT", 1, 2**32 - 1, 2**64 - 1)
    with pytest.raises(InputError, match="found 30"):
        Packet.from_bytes(prefix + bytes(12))


def test_decode_refuses_a_packet_whose_shape_its_payload_cannot_hold():
    packet = Packet(codec="group4:5", shape=(2**40, 2**20), dtype=torch.float32, payload=example().payload)
    with pytest.raises(InputError, match="group4:5 puts"):
        codec_from_name("group4:5").decode(packet)
