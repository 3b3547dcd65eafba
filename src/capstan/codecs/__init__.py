"""Codecs: in how many bits does a tensor cross a boundary?

    codec = codec_from_name("group4:64")
    packet = codec.encode(weights)          # codec.encoded_bytes(weights.shape, weights.dtype) bytes
    weights = codec.decode(packet)

Every codec says its exact size before it encodes and bounds its error in its docstring. What is encoded again
and again, by one sender under one key, has a memory: a `Compressor` of what was lost, a `Delta` of what the
receiver holds already.
"""

from capstan.codecs.casts import Cast
from capstan.codecs.codec import Codec
from capstan.codecs.compressor import Compressor
from capstan.codecs.delta import Delta
from capstan.codecs.error_feedback import ErrorFeedback
from capstan.codecs.groups import GroupQuantised
from capstan.codecs.identity import Identity
from capstan.codecs.minmax import MinMaxUInt8
from capstan.codecs.names import codec_from_name
from capstan.codecs.packet import Packet
from capstan.codecs.sign import Sign
from capstan.codecs.sparse import RandomK, TopK

__all__ = [
    "Cast",
    "Codec",
    "Compressor",
    "Delta",
    "ErrorFeedback",
    "GroupQuantised",
    "Identity",
    "MinMaxUInt8",
    "Packet",
    "RandomK",
    "Sign",
    "TopK",
    "codec_from_name",
]
