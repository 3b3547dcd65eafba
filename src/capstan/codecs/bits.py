"""Packing codes of 2, 3, 4 or 8 bits into bytes, the first code in the lowest bits.

Codes are moved by shifts and masks on machine words. Unpacking doubles the distance between the two halves
of a word until every code has a byte of its own:

    4 bits   ........ ........ BBBBAAAA  ->  ....BBBB ....AAAA

so that n codes cost log2(n) shifts of a word that holds all n, with no table and no strided write. Words
are little-endian, like every machine that torch runs on.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from capstan.codecs.elements import reinterpret


class _Step(NamedTuple):
    shift: int
    mask: int


class _Word(NamedTuple):
    """How `num_codes` codes, packed in `num_bytes` bytes, become the bytes of one word of `dtype`."""

    num_codes: int
    num_bytes: int
    dtype: torch.dtype
    spread: tuple[_Step, ...]


_WORDS = {
    2: _Word(4, 1, torch.int32, (_Step(12, 0x000F000F), _Step(6, 0x03030303))),
    3: _Word(
        8,
        3,
        torch.int64,
        (_Step(20, 0x00000FFF00000FFF), _Step(10, 0x003F003F003F003F), _Step(5, 0x0707070707070707)),
    ),
    4: _Word(2, 1, torch.int16, (_Step(4, 0x0F0F),)),
}

WIDTHS = (2, 3, 4, 8)
"""The numbers of bits a code can have."""


def packed_bytes(num_codes: int, num_bits: int) -> int:
    """The bytes that hold `num_codes` codes: ceil(num_codes * num_bits / 8)."""
    return -(-num_codes * num_bits // 8)


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """Pack the last dimension: uint8 `codes` (..., codes), each below 2**num_bits, to uint8 (..., bytes).

    Bit b of code i becomes bit (i * num_bits + b) of the row, counted from the lowest bit of its first byte.
    The bits after the last code are 0.
    """
    if num_bits == 8:
        return codes
    word, size = _WORDS[num_bits], packed_bytes(codes.shape[-1], num_bits)
    whole = _whole_words(codes, word.num_codes)
    packed = reinterpret(whole.flatten(), word.dtype).view(
        *codes.shape[:-1], whole.shape[-1] // word.num_codes
    )
    for step, mask in _gather_steps(word):
        packed = packed.bitwise_or(packed >> step).bitwise_and_(mask)
    if word.num_bytes == 1:
        return packed.to(torch.uint8)
    bytes_of_words: Tensor = packed.view(torch.uint8).unflatten(-1, (-1, packed.element_size()))
    return bytes_of_words[..., : word.num_bytes].flatten(-2)[..., :size]


def unpack(packed: Tensor, num_codes: int, num_bits: int) -> Tensor:
    """The inverse of `pack`: uint8 (..., bytes), of any strides, to uint8 (..., num_codes)."""
    if num_bits == 8:
        return packed
    word = _WORDS[num_bits]
    codes = _load_words(packed, word)
    for shift, mask in word.spread:
        codes = codes.bitwise_or_(codes << shift).bitwise_and_(mask)
    return codes.view(torch.uint8)[..., :num_codes]


def _gather_steps(word: _Word) -> list[_Step]:
    """The steps of `spread` backwards; each mask keeps what was together before the step that split it."""
    masks = [2 ** (8 * word.num_bytes) - 1, *(step.mask for step in word.spread[:-1])]
    return [_Step(step.shift, mask) for step, mask in zip(word.spread, masks, strict=True)][::-1]


def _whole_words(codes: Tensor, num_codes: int) -> Tensor:
    missing = -codes.shape[-1] % num_codes
    if not missing:
        return codes
    return torch.cat((codes, codes.new_zeros((*codes.shape[:-1], missing))), -1)


def _load_words(packed: Tensor, word: _Word) -> Tensor:
    if word.num_bytes == 1:
        return packed.to(word.dtype)
    num_words = -(-packed.shape[-1] // word.num_bytes)
    loaded = packed.new_zeros((*packed.shape[:-1], num_words, word.dtype.itemsize))
    whole = packed.shape[-1] // word.num_bytes
    loaded[..., :whole, : word.num_bytes] = packed[..., : whole * word.num_bytes].unflatten(
        -1, (whole, word.num_bytes)
    )
    if whole < num_words:
        rest = packed[..., whole * word.num_bytes :]
        loaded[..., whole, : rest.shape[-1]] = rest
    return loaded.view(word.dtype).squeeze(-1)
