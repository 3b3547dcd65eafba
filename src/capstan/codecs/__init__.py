"""Codecs: in how many bits does a tensor cross a boundary?

    codec = codec_from_name("group4:64")
    packet = codec.encode(weights)          # codec.encoded_bytes(weights.shape, weights.dtype) bytes
    weights = codec.decode(packet)

Every codec says its exact size before it encodes and bounds its error in its docstring.
"""

from capstan.codecs.casts import Cast
from capstan.codecs.codec import Codec
from capstan.codecs.groups import GroupQuantised
from capstan.codecs.identity import Identity
from capstan.codecs.names import codec_from_name
from capstan.codecs.packet import Packet

__all__ = ["Cast", "Codec", "GroupQuantised", "Identity", "Packet", "codec_from_name"]
