"""Buckets are cut in order, by kind and size; peers meet as they should."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capstan.data_parallel.buckets import cut
from capstan.data_parallel.peers import neighbours, shift_one
from capstan.errors import UsageError

items = st.lists(st.tuples(st.integers(1, 100), st.sampled_from("ab")), max_size=40)


@given(items, st.integers(1, 200))
def test_every_parameter_is_in_one_bucket_of_its_kind_in_order(parameters, bucket_bytes):
    sizes, kinds = [size for size, _ in parameters], [kind for _, kind in parameters]
    buckets = cut(sizes, kinds, bucket_bytes=bucket_bytes)
    assert sorted(at for bucket in buckets for at in bucket) == list(range(len(parameters)))
    for bucket in buckets:
        assert bucket == sorted(bucket)
        assert len({kinds[at] for at in bucket}) == 1
        assert sum(sizes[at] for at in bucket[:-1]) < bucket_bytes
    small = [bucket for bucket in buckets if sum(sizes[at] for at in bucket) < bucket_bytes]
    assert len(small) <= len(set(kinds))


def test_a_bucket_of_no_bytes_is_refused():
    with pytest.raises(UsageError, match="bucket_bytes"):
        cut([1], ["a"], bucket_bytes=0)


@given(st.integers(2, 33), st.integers(0, 200))
def test_peers_are_each_others_and_at_most_one_sits_out(size, round_number):
    peers = [shift_one(rank, size, round_number) for rank in range(size)]
    for rank, peer in enumerate(peers):
        assert peer is None or (peer != rank and peers[peer] == rank)
    assert peers.count(None) == size % 2


@given(st.integers(1, 16))
def test_of_an_even_number_each_meets_the_whole_other_half_in_half_as_many_rounds(half):
    for rank in range(2 * half):
        met = {shift_one(rank, 2 * half, t) for t in range(half)}
        assert met == (set(range(half, 2 * half)) if rank < half else set(range(half)))


@given(st.integers(1, 16).map(lambda half: 2 * half + 1))
def test_of_an_odd_number_each_meets_all_others(size):
    for rank in range(size):
        assert {shift_one(rank, size, t) for t in range(size)} - {None} == set(range(size)) - {rank}


def test_neighbours_on_a_ring():
    assert neighbours(0, 4) == (3, 1)
    assert neighbours(1, 2) == (0, 0)
