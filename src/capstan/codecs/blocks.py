"""Cutting a strided tensor into blocks of bounded size, in C order, without copying it."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Block(NamedTuple):
    """A view of part of a tensor, and how many groups come before it in C order."""

    first_group: int
    num_groups: int
    values: Tensor


def blocks(values: Tensor, *, group_size: int, max_groups: int) -> Iterator[Block]:
    """Cover `values` by views of at most `max_groups` groups each, in C order; each element is in one view.

    The last dimension is cut in groups of `group_size`, the last of which may be short; no group lies in two
    views.
    """
    if values.dim() == 0:
        values = values.unsqueeze(0)
    if values.numel():
        yield from _cut(values, 0, group_size, max_groups)


def _cut(values: Tensor, first_group: int, group_size: int, max_groups: int) -> Iterator[Block]:
    groups_each = _groups_per_index(values, group_size)
    if values.dim() > 1 and groups_each > max_groups:
        for index in range(values.shape[0]):
            yield from _cut(values[index], first_group + index * groups_each, group_size, max_groups)
        return
    step = max_groups * group_size if values.dim() == 1 else max_groups // groups_each
    for start in range(0, values.shape[0], step):
        part = values[start : start + step]
        size = -(-part.shape[0] // group_size) if values.dim() == 1 else part.shape[0] * groups_each
        yield Block(first_group, size, part)
        first_group += size


def _groups_per_index(values: Tensor, group_size: int) -> int:
    groups = -(-values.shape[-1] // group_size)
    for size in values.shape[1:-1]:
        groups *= size
    return groups
