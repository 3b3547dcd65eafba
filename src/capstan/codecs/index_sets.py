"""Sets of positions in few bits: Elias-Fano coding, whose size depends on the counts alone.

Of k positions below n, each in order, the lowest w = floor(log2(n / k)) bits are written as they are. The
rest is a number from 0 to (n - 1) >> w that never falls, told by a bitmap whose i-th one stands at i + rest.
That makes k w + k + ((n - 1) >> w) + 1 bits, at most about two bits a position above the least there is.

Source: Elias, "Efficient storage and retrieval by content and address of static files" (1974).
"""

import torch
from torch import Tensor

from capstan.codecs.bitmaps import pack_bits, unpack_bits
from capstan.errors import InputError


def low_bits(num_positions: int, limit: int) -> int:
    """How many bits of each of `num_positions` positions below `limit` are written as they are."""
    return max(0, (limit // num_positions).bit_length() - 1) if num_positions else 0


def index_bytes(num_positions: int, limit: int) -> int:
    """The exact size of a set of `num_positions` positions below `limit`."""
    if not num_positions:
        return 0
    low, high = _sizes(num_positions, limit)
    return -(-low // 8) - (-high // 8)


def write_positions(positions: Tensor, limit: int) -> Tensor:
    """Positions (int64, rising, each below `limit`) as flat uint8 of `index_bytes`."""
    count = positions.numel()
    if not count:
        return positions.new_empty(0, dtype=torch.uint8)
    width = low_bits(count, limit)
    steps = torch.arange(width, device=positions.device)
    low = (positions[:, None] >> steps).bitwise_and_(1).bool().view(-1)
    high = torch.zeros(_sizes(count, limit)[1], dtype=torch.bool, device=positions.device)
    high[(positions >> width) + torch.arange(count, device=positions.device)] = True
    return torch.cat((pack_bits(low), pack_bits(high)))


def read_positions(packed: Tensor, count: int, limit: int) -> Tensor:
    """The inverse of `write_positions`; bytes that it would not write raise `InputError`."""
    if not count:
        return packed.new_empty(0, dtype=torch.int64)
    width = low_bits(count, limit)
    num_low, num_high = _sizes(count, limit)
    split = -(-num_low // 8)
    steps = torch.arange(width, device=packed.device)
    low = (unpack_bits(packed[:split], num_low).view(count, width).long() << steps).sum(-1)
    ones = unpack_bits(packed[split:], num_high).nonzero().view(-1)
    if ones.numel() != count:
        raise InputError(f"Wanted {count} positions, found {ones.numel()}: the payload is damaged.")
    positions: Tensor = ((ones - torch.arange(count, device=packed.device)) << width) + low
    if int(positions[-1]) >= limit or bool((positions[1:] <= positions[:-1]).any()):
        raise InputError(f"Wanted rising positions below {limit}: the payload is damaged.")
    return positions


def _sizes(count: int, limit: int) -> tuple[int, int]:
    """The bits of the low parts and of the bitmap."""
    width = low_bits(count, limit)
    return count * width, count + ((limit - 1) >> width) + 1
