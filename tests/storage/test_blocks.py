"""Blocks of arrays: every row in one block, in order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capstan.errors import UsageError
from capstan.storage import BlockSource, NumpyBlocks


@given(num_rows=st.integers(0, 40), rows_per_block=st.integers(1, 50))
def test_the_blocks_one_after_the_other_are_the_arrays(num_rows, rows_per_block):
    columns = {"x": np.arange(3 * num_rows).reshape(num_rows, 3), "y": np.arange(num_rows) % 2}
    source: BlockSource = NumpyBlocks(columns, rows_per_block=rows_per_block)
    blocks = [source.read(block) for block in range(source.num_blocks)]
    for name, column in columns.items():
        parts = [block[name] for block in blocks]
        np.testing.assert_array_equal(np.concatenate([column[:0], *parts]), column)
    sizes = [source.num_rows(block) for block in range(source.num_blocks)]
    assert sizes == [len(block["y"]) for block in blocks]
    assert all(size == rows_per_block for size in sizes[:-1])


def test_reading_a_block_copies_nothing():
    rows = np.arange(10)
    assert np.shares_memory(NumpyBlocks({"x": rows}, rows_per_block=4).read(1)["x"], rows)


def test_another_fingerprint_means_other_data():
    rows = np.arange(10)
    same = {NumpyBlocks({"x": rows.copy()}, rows_per_block=4).fingerprint for _ in range(2)}
    assert len(same) == 1
    others = [
        NumpyBlocks({"x": rows}, rows_per_block=5),
        NumpyBlocks({"y": rows}, rows_per_block=4),
        NumpyBlocks({"x": rows.astype(np.int32)}, rows_per_block=4),
        NumpyBlocks({"x": rows + 1}, rows_per_block=4),
        NumpyBlocks({"x": rows[:9]}, rows_per_block=4),
    ]
    assert len(same | {each.fingerprint for each in others}) == 6


@pytest.mark.parametrize("block", [-1, 3])
def test_a_block_that_is_not_there_is_named(block):
    source = NumpyBlocks({"x": np.arange(10)}, rows_per_block=4)
    for ask in (source.read, source.num_rows):
        with pytest.raises(UsageError, match=f"blocks 0 to 2; wanted block {block}"):
            ask(block)


@pytest.mark.parametrize(
    ("columns", "rows_per_block", "said"),
    [
        ({}, 4, r"equally many rows; found \{\}"),
        ({"x": np.arange(3), "y": np.arange(4)}, 4, "'x': 3, 'y': 4"),
        ({"x": np.arange(3)}, 0, "at least one row; rows_per_block is 0"),
    ],
)
def test_what_cannot_be_blocks_is_refused(columns, rows_per_block, said):
    with pytest.raises(UsageError, match=said):
        NumpyBlocks(columns, rows_per_block=rows_per_block)
