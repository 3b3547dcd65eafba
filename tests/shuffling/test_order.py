"""The order of an epoch: a permutation, resumable at every row, the same for every world size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capstan.errors import UsageError
from capstan.shuffling.exchange import PASSES, exchange
from capstan.shuffling.order import STRATEGIES, Order, num_steps
from capstan.shuffling.randomness import below, permutation

from .arbitrary import orders


def stored(order):
    return [(block, row) for block, size in enumerate(order.sizes) for row in range(size)]


@given(orders())
def test_every_epoch_visits_each_row_once(order):
    found = order.addresses()
    assert sorted(map(tuple, found.tolist())) == stored(order)
    assert np.array_equal(found, order.at_epoch(order.epoch).addresses())


@given(orders(), st.data())
def test_a_stream_goes_on_from_any_row_as_it_would_have(order, data):
    stream = data.draw(st.integers(0, order.num_streams - 1))
    whole = order.stream_addresses(stream)
    assert len(whole) == order.stream_rows(stream)
    start = data.draw(st.integers(0, len(whole)))
    assert np.array_equal(order.stream_addresses(stream, start), whole[start:])


@given(orders())
def test_a_buffer_holds_what_it_was_granted_and_blocks_are_read_as_often_as_said(order):
    reads = np.zeros(len(order.sizes), int)
    rows_granted = max(order.sizes) * order.blocks_per_stream
    for stream in range(order.num_streams):
        for refill in order.refills(stream):
            assert order.strategy == "full" or len(refill.pieces) <= order.blocks_per_stream
            if order.strategy in ("corgipile", "block", "none"):
                assert len(refill.emit) <= rows_granted
            for piece in refill.pieces:
                reads[piece.block] += 1
    assert np.array_equal(reads, order.block_reads())
    if order.num_streams == 1:
        assert np.array_equal(reads, np.minimum(order.sizes, 1))


def test_one_stream_is_the_two_level_shuffle_as_it_is_defined():
    order = Order(sizes=(3, 4, 0, 5, 2, 6), seed=3, epoch=2, buffer_blocks=2)
    blocks = np.array([0, 1, 3, 4, 5])[permutation(5, 3, 2, 0)]
    expected = []
    for index, (low, high) in enumerate([(0, 1), (1, 3), (3, 5)]):  # five blocks in three buffers, evenly
        buffer = [(int(b), row) for b in blocks[low:high] for row in range(order.sizes[b])]
        expected += [buffer[at] for at in permutation(len(buffer), 3, 2, 1, 0, index)]
    assert list(map(tuple, order.addresses().tolist())) == expected


def test_the_window_and_the_reservoir_are_what_a_loop_over_rows_does():
    sizes, size = (7,) * 9, 14
    for strategy in ("window", "reservoir"):
        order = Order(sizes=sizes, seed=5, strategy=strategy, buffer_blocks=2)
        emitted, buffer, at = [], [], 0
        for index in range(9):
            arrived = 7 * index
            filling = min(7, max(0, size - arrived))
            key = (5, 0, 2, 0, index)
            limits = size if strategy == "window" else np.arange(arrived + filling, arrived + 7) + 1
            slots = iter(below(limits, 7 - filling, *key).tolist())
            for _ in range(7):
                if len(buffer) < size:
                    buffer.append(at)
                elif (slot := next(slots)) < size:
                    emitted.append(buffer[slot])
                    buffer[slot] = at
                else:
                    emitted.append(at)
                at += 1
        emitted += [buffer[slot] for slot in permutation(size, 5, 0, 3, 0)]
        found = order.addresses()
        assert (found[:, 0] * 7 + found[:, 1]).tolist() == emitted


@given(st.integers(1, 8), st.lists(st.integers(PASSES, 7), max_size=30))
def test_an_exchange_is_the_loop_over_arrivals(size, slots):
    slots = [min(slot, size - 1) for slot in slots]
    buffer, emitted = list(range(size)), []
    for arrival, slot in enumerate(slots, start=size):
        emitted.append(arrival if slot == PASSES else buffer[slot])
        if slot != PASSES:
            buffer[slot] = arrival
    emit, keep = exchange(np.array(slots, np.int64), size)
    assert (emit.tolist(), keep.tolist()) == (emitted, buffer)


def test_what_each_strategy_does_to_sorted_blocks():
    def blocks(strategy, **more):
        order = Order(sizes=(10,) * 20, seed=1, strategy=strategy, buffer_blocks=4, **more)
        return order.addresses()

    assert blocks("none").tolist() == [[b, row] for b in range(20) for row in range(10)]
    by_block = blocks("block")
    assert (by_block[:, 1] == np.tile(np.arange(10), 20)).all()
    assert (np.diff(by_block[:, 0]) != 1).any()
    assert len(set(blocks("corgipile")[:40, 0].tolist())) == 4
    assert len(set(blocks("full")[:40, 0].tolist())) > 10
    # A window of 40 rows emits at position p nothing from beyond row p + 40.
    window = blocks("window")
    assert (window[:, 0] * 10 + window[:, 1] < np.arange(200) + 40).all()


def test_a_buffer_of_all_blocks_mixes_all_rows_and_one_block_is_shuffled_within():
    order = Order(sizes=(10,) * 5, seed=1, buffer_blocks=5)
    (refill,) = order.refills(0)
    assert len(refill.emit) == 50
    one = Order(sizes=(50,), seed=1).addresses()[:, 1]
    assert sorted(one.tolist()) == list(range(50))
    assert one.tolist() != list(range(50))


def test_epochs_seeds_and_streams_differ_and_an_epoch_needs_none_before_it():
    order = Order(sizes=(10,) * 20, seed=1, buffer_blocks=4)
    later = order.at_epoch(7)
    assert later.addresses().tolist() != order.addresses().tolist()
    assert Order(sizes=(10,) * 20, seed=2, buffer_blocks=4).addresses().tolist() != order.addresses().tolist()


def test_the_order_is_the_same_everywhere():
    # Written down once: a change of these numbers breaks the resuming of runs that are under way.
    found = Order(sizes=(3, 3, 3), seed=42, epoch=1, buffer_blocks=2).addresses()
    assert (found[:, 0] * 3 + found[:, 1]).tolist() == GOLDEN
    assert below(10, 5, 1).tolist() == BELOW


GOLDEN = [6, 8, 7, 1, 0, 4, 5, 3, 2]
BELOW = [0, 0, 0, 8, 2]


def test_every_number_below_a_limit_is_drawn_about_equally_often():
    counts = np.bincount(below(10, 100_000, 3), minlength=10)
    # Binomial with n = 1e5 and p = 0.1 has a standard deviation of 95; five of them.
    assert (abs(counts - 10_000) < 475).all()


@given(st.integers(1, 500), st.integers(1, 64), st.sampled_from([1, 2, 4, 8]))
def test_steps_leave_out_fewer_rows_than_there_are_streams(rows, batch, streams):
    steps = num_steps(rows, batch, streams)
    assert 0 <= rows - min(rows, steps * batch) < max(streams, 1)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"strategy": "corgipil"}, "Did you mean 'corgipile'"),
        ({"seed": -1}, "seed is -1; give 0 or more"),
        ({"buffer_blocks": 0}, "buffer_blocks is 0; give 1 or more"),
        ({"sizes": (0, 0)}, "no row to order in 2 blocks"),
        ({"sizes": ()}, "no row to order in 0 blocks"),
    ],
)
def test_what_is_no_order_is_refused(wrong, says):
    with pytest.raises(UsageError, match=says):
        Order(**{"sizes": (1, 2), "seed": 0} | wrong)


def test_every_strategy_is_described():
    assert set(STRATEGIES) == {"corgipile", "full", "none", "block", "window", "reservoir"}
