"""Blocks: whole groups, bounded, in C order, every element once."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.codecs.blocks import blocks

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@settings(max_examples=150, deadline=None)
@given(shapes, st.integers(1, 7), st.integers(1, 9))
def test_blocks_are_bounded_in_c_order_and_hold_each_element_once(shape, group_size, max_groups):
    values = torch.arange(torch.Size(shape).numel()).view(shape)
    cut = list(blocks(values, group_size=group_size, max_groups=max_groups))
    assert torch.cat([torch.empty(0, dtype=torch.int64), *(block.values.reshape(-1) for block in cut)]).equal(
        values.reshape(-1)
    )
    next_group = 0
    for block in cut:
        assert block.first_group == next_group
        assert 1 <= block.num_groups <= max_groups
        length = block.values.shape[-1]
        assert block.num_groups == block.values.numel() // length * -(-length // group_size)
        next_group += block.num_groups


def test_blocks_are_views():
    values = torch.zeros(6, 5).T
    for block in blocks(values, group_size=2, max_groups=3):
        block.values.fill_(1)
    assert values.min() == 1
