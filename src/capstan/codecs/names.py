"""From a codec's name to the codec.

The families are named, not imported: a codec makes packets, and reading a packet needs its codec. So a
packet knows only names, and a family is imported when one of its names is first read.
"""

from importlib import import_module
from typing import TYPE_CHECKING, cast

from capstan.errors import unknown_name

if TYPE_CHECKING:
    from capstan.codecs.codec import Codec

FAMILIES = {
    "identity": ("capstan.codecs.identity", "Identity"),
    "cast": ("capstan.codecs.casts", "Cast"),
    "group1": ("capstan.codecs.groups", "GroupQuantised"),
    "group2": ("capstan.codecs.groups", "GroupQuantised"),
    "group3": ("capstan.codecs.groups", "GroupQuantised"),
    "group4": ("capstan.codecs.groups", "GroupQuantised"),
    "group5": ("capstan.codecs.groups", "GroupQuantised"),
    "group6": ("capstan.codecs.groups", "GroupQuantised"),
    "group7": ("capstan.codecs.groups", "GroupQuantised"),
    "group8": ("capstan.codecs.groups", "GroupQuantised"),
    "minmax8": ("capstan.codecs.minmax", "MinMaxUInt8"),
    "sign": ("capstan.codecs.sign", "Sign"),
    "topk": ("capstan.codecs.sparse", "TopK"),
    "randomk": ("capstan.codecs.sparse", "RandomK"),
}
"""The part of a name before the first colon -> the module and class that read the whole name."""


def codec_from_name(name: str) -> "Codec":
    """The codec whose `name` this is: `codec_from_name(codec.name) == codec`.

    Parts with a default may be left out or written in full, so `group4` and `group4:64` are one codec. An
    unknown family raises `UsageError` and suggests the nearest one; so does a name its family cannot read.
    """
    family = name.partition(":")[0]
    if family not in FAMILIES:
        raise unknown_name("codec", family, FAMILIES)
    module, class_name = FAMILIES[family]
    codec_class = cast("type[Codec]", getattr(import_module(module), class_name))
    return codec_class.from_name(name)
