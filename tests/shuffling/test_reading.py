"""Rows are read in the order's positions, whatever the ranks, the batches and the step to go on from."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.errors import InputError, UsageError
from capstan.shuffling.order import Order
from capstan.shuffling.reading import Batches, Share, gathered
from capstan.storage import NumpyBlocks

from .arbitrary import orders


class Numbered:
    """Blocks of these sizes; a row is its block and its place in it. `damaged` cannot be read."""

    fingerprint = "numbered"

    def __init__(self, sizes, damaged=None):
        self.sizes, self.damaged, self.threads = sizes, damaged, set()

    @property
    def num_blocks(self):
        return len(self.sizes)

    def num_rows(self, block):
        return self.sizes[block]

    def read(self, block):
        self.threads.add(threading.current_thread().name)
        if block == self.damaged:
            raise InputError(f"block {block} is damaged")
        rows = np.arange(self.sizes[block])
        return {"address": np.stack([np.full(len(rows), block), rows], axis=1), "row": rows}


def emitted(order, batch_size, rank=0, world_size=1, start_step=0):
    share = Share(order=order, batch_size=batch_size, rank=rank, world_size=world_size)
    with Batches(Numbered(order.sizes), share, start_step=start_step) as batches:
        return [batch["address"] for batch in batches]


@settings(max_examples=60)
@given(orders(), st.integers(1, 12), st.data())
def test_batches_are_the_orders_positions_from_any_step(order, batch_size, data):
    steps = Share(order=order, batch_size=batch_size).num_steps
    start = data.draw(st.integers(0, steps))
    found = emitted(order, batch_size, start_step=start)
    assert len(found) == steps - start
    whole = order.addresses()[start * batch_size : steps * batch_size]
    assert np.array_equal(np.concatenate([np.empty((0, 2), int), *found]), whole)
    assert all(len(batch) == batch_size for batch in found[:-1])


@settings(max_examples=40)
@given(orders(), st.sampled_from([2, 3, 4, 6, 12]), st.integers(1, 3), st.data())
def test_any_number_of_ranks_sees_the_same_batches_in_equally_many_steps(order, world_size, times, data):
    order = Order(
        sizes=order.sizes, seed=order.seed, strategy=order.strategy, num_streams=12, buffer_blocks=5
    )
    batch_size = world_size * times
    start = data.draw(st.integers(0, Share(order=order, batch_size=batch_size).num_steps))
    alone = emitted(order, batch_size, start_step=start)
    ranks = [emitted(order, batch_size, rank, world_size, start) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {len(alone)}
    for step, whole in enumerate(alone):
        for rank in range(world_size):
            assert np.array_equal(
                ranks[rank][step], whole[_share_of(rank, world_size, start + step, batch_size)]
            )


def _share_of(rank, world_size, step, batch_size):
    return slice((rank - step * batch_size) % world_size, None, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_rank_reads_its_share_of_the_blocks_and_the_next_buffer_meanwhile(world_size):
    order = Order(sizes=(10,) * 64, seed=0, buffer_blocks=8, num_streams=8)
    share = Share(order=order, batch_size=16, rank=world_size - 1, world_size=world_size)
    source = Numbered(order.sizes)
    with Batches(source, share) as batches:
        rows = sum(len(batch["row"]) for batch in batches)
        assert rows == 640 // world_size
        assert batches.account.num_blocks == 64 // world_size
    assert threading.current_thread().name not in source.threads
    assert len(source.threads) == 1


def test_no_more_than_two_buffers_are_read_ahead_and_the_thread_ends():
    order = Order(sizes=(10,) * 50, seed=0, buffer_blocks=5)
    source = Numbered(order.sizes)
    batches = Batches(source, Share(order=order, batch_size=10))
    next(iter(batches))
    batches.close()
    # The first buffer, which is emitted, and the second, which may have been read by now.
    assert batches.account.num_blocks in (5, 10)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("capstan-reader")]


def test_bytes_are_counted_as_they_are_read():
    columns = {"x": np.arange(40.0).reshape(20, 2), "y": np.arange(20, dtype=np.int8)}
    source = NumpyBlocks(columns, rows_per_block=3)
    order = Order(sizes=(3, 3, 3, 3, 3, 3, 2), seed=0, buffer_blocks=2)
    with Batches(source, Share(order=order, batch_size=4)) as batches:
        rows = np.concatenate([batch["y"] for batch in batches])
    assert sorted(rows.tolist()) == list(range(20))
    assert batches.account.size_bytes == 20 * 17


def test_what_fails_in_the_background_is_raised_where_rows_are_taken():
    order = Order(sizes=(4, 4, 4, 4), seed=0, strategy="none")
    with (
        pytest.raises(InputError, match="block 2 is damaged"),
        Batches(Numbered(order.sizes, damaged=2), Share(order=order, batch_size=4)) as batches,
    ):
        list(batches)


def test_columns_that_differ_between_blocks_are_refused():
    with pytest.raises(InputError, match="Blocks have different columns"):
        gathered([{"a": np.zeros(2)}, {"a": np.zeros((2, 3))}], np.arange(4))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"world_size": 3}, "num_streams is 4, which 3 readers"),
        ({"world_size": 4, "batch_size": 6}, "batch_size is 6, which 4 readers"),
        ({"rank": 2, "world_size": 2}, "ranks 0 to 1; this is rank 2"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_ranks_that_cannot_share_are_refused(wrong, says):
    order = Order(sizes=(5,) * 8, seed=0, num_streams=4)
    with pytest.raises(UsageError, match=says):
        Share(**{"order": order, "batch_size": 8} | wrong)


def test_a_step_that_is_not_there_and_other_blocks_are_refused():
    order = Order(sizes=(5,) * 8, seed=0)
    with pytest.raises(UsageError, match="steps 0 to 5; wanted step 6"):
        Batches(Numbered(order.sizes), Share(order=order, batch_size=8), start_step=6)
    with pytest.raises(InputError, match="other blocks"):
        Batches(Numbered((5,) * 7), Share(order=order, batch_size=8))
