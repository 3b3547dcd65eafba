"""Booleans as single bits, the first in the lowest bit of the first byte."""

import torch
from torch import Tensor

# Eight booleans are the eight bytes of a word. In its product with this number the lowest bit of byte i is
# bit 56 + i, and no two sums meet.
_GATHER = 0x0102040810204080


def pack_bits(flags: Tensor) -> Tensor:
    """Flat booleans to flat uint8, ceil(flags / 8) of them; the bits after the last flag are 0."""
    missing = -flags.numel() % 8
    whole = torch.cat((flags, flags.new_zeros(missing))) if missing else flags.contiguous()
    words = whole.view(torch.uint8).view(-1, 8).view(torch.int64).view(-1)
    return ((words * _GATHER) >> 56).bitwise_and_(255).to(torch.uint8)


def unpack_bits(packed: Tensor, num_flags: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 of 0 and 1."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits: Tensor = (packed[:, None] >> shifts).bitwise_and_(1).view(-1)
    return bits[:num_flags]
