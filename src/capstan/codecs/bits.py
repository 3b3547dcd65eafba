"""Packing codes of 1 to 8 bits into bytes, the first code in the lowest bits.

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
    """Move the upper half of every field up by `shift`; `mask` has the halves where they are afterwards.

    `upper` has the upper halves where they were, if they would run into themselves, which happens where they
    move by less than they are wide; else it is 0, and one operation is saved.
    """

    shift: int
    mask: int
    upper: int = 0


class _Word(NamedTuple):
    """How `num_codes` codes, packed in `num_bytes` bytes, become the bytes of one word of `dtype`."""

    num_codes: int
    num_bytes: int
    dtype: torch.dtype
    spread: tuple[_Step, ...]


def _long_word(num_bits: int) -> _Word:
    """Eight codes in a word of 64 bits: one step each from 8 to 4, 2 and 1 codes a field."""
    steps = []
    for num_codes in (4, 2, 1):  # of a half
        width, shift = num_codes * num_bits, num_codes * (8 - num_bits)
        starts = range(0, 64, 16 * num_codes)
        half = (1 << width) - 1
        mask = sum(half << start | half << (start + 8 * num_codes) for start in starts)
        upper = sum(half << (start + width) for start in starts) if shift < width else 0
        steps.append(_Step(shift, mask, upper))
    return _Word(8, num_bits, torch.int64, tuple(steps))


_WORDS = {
    1: _long_word(1),
    2: _Word(4, 1, torch.int32, (_Step(12, 0x000F000F), _Step(6, 0x03030303))),
    3: _long_word(3),
    4: _Word(2, 1, torch.int16, (_Step(4, 0x0F0F),)),
    5: _long_word(5),
    6: _long_word(6),
    7: _long_word(7),
}

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)
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
        packed = _together(packed, step, mask)
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
    for step in word.spread:
        codes = _apart(codes, step)
    return codes.view(torch.uint8)[..., :num_codes]


def _apart(codes: Tensor, step: _Step) -> Tensor:
    if not step.upper:
        return codes.bitwise_or_(codes << step.shift).bitwise_and_(step.mask)
    moved = codes & step.upper
    return codes.bitwise_xor_(moved).bitwise_or_(moved << step.shift)


def _together(packed: Tensor, step: _Step, mask: int) -> Tensor:
    if not step.upper:
        return packed.bitwise_or(packed >> step.shift).bitwise_and_(mask)
    moved = packed & (step.upper << step.shift)
    return packed.bitwise_xor(moved).bitwise_or_(moved >> step.shift)


def _gather_steps(word: _Word) -> list[tuple[_Step, int]]:
    """The steps of `spread` backwards; each mask keeps what was together before the step that split it."""
    masks = [2 ** (8 * word.num_bytes) - 1, *(step.mask for step in word.spread[:-1])]
    return [*zip(word.spread, masks, strict=True)][::-1]


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
