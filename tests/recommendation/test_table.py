"""Rows by ID: which are made, what they hold, which go, and that nothing takes another's gradient."""

import copy
import resource
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.errors import DoesNotFit, InputError, UsageError
from capstan.hardware.free_memory import Amount
from capstan.recommendation import (
    Adagrad,
    Adam,
    Bags,
    EmbeddingTable,
    Frequency,
    LeastFrequent,
    LeastRecent,
    Probability,
    Sgd,
    TimeToLive,
)


def train(table, ids, gradient=0.0, offsets=None):
    bags = Bags.of(np.asarray(ids, dtype=np.uint64), offsets)
    pooled, lookup = table.lookup(bags)
    table.apply_gradients(lookup, np.full_like(pooled, gradient))
    return pooled


def held(table):
    return sorted(table.state_dict()["ids"].tolist())


MASK = 2**64 - 1


def mixed(x):
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & MASK
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def test_a_new_row_is_the_documented_function_of_seed_table_and_id():
    table = EmbeddingTable(5, capacity=4, seed=3, name="city", initial=(-0.5, 0.5))
    key = mixed(2**63 + 17 ^ table._fields.init_key)
    expected = [(mixed((key + (j + 1) * 0x9E3779B97F4A7C15) & MASK) >> 40) / 2**24 - 0.5 for j in range(5)]
    assert train(table, [2**63 + 17])[0].tolist() == expected
    assert table.initial_row(2**63 + 17)[:5].tolist() == expected


def test_initial_rows_do_not_depend_on_order_and_differ_between_seeds_and_tables():
    ids = np.arange(1000, dtype=np.uint64)
    first, second = (EmbeddingTable(8, capacity=1000, seed=1) for _ in range(2))
    train(first, ids)
    for part in np.array_split(ids[::-1], 7):
        train(second, part)
    assert np.array_equal(first.rows_of(ids), second.rows_of(ids))
    other_seed = EmbeddingTable(8, capacity=1000, seed=2)
    other_table = EmbeddingTable(8, capacity=1000, seed=1, name="other")
    for other in (other_seed, other_table):
        train(other, ids)
        assert not (other.rows_of(ids) == first.rows_of(ids)).any(axis=1).any()


def test_initial_rows_are_uniform():
    table = EmbeddingTable(64, capacity=4096, initial=(-1, 1))
    rows = train(table, np.arange(4096))
    # 262,144 draws: the mean's standard error is 0.0011 and the variance's 0.0006; five of each.
    assert abs(rows.mean()) < 0.0056
    assert abs(rows.var() - 1 / 3) < 0.003
    assert -1 <= rows.min() < -0.999
    assert 0.999 < rows.max() < 1


@pytest.mark.parametrize("pooling", ["sum", "mean", "sqrt"])
def test_pooling_counts_repeats_and_an_empty_bag_is_zeros(pooling):
    table = EmbeddingTable(3, capacity=8)
    bags = Bags.of([1, 2, 1, 3], [0, 3, 3, 4])
    pooled, _ = table.lookup(bags, pooling=pooling)
    one, two, three = table.rows_of([1, 2, 3])
    divisor = {"sum": 1, "mean": 3, "sqrt": np.sqrt(3)}[pooling]
    # three additions and one division in float32
    assert pooled[0] == pytest.approx((2 * one + two) / divisor, rel=4 * 2**-24, abs=1e-9)
    assert pooled[1].tolist() == [0, 0, 0]
    assert pooled[2].tolist() == three.tolist()


def test_evaluation_reads_zeros_for_unknown_ids_and_inserts_nothing():
    table = EmbeddingTable(4, capacity=2)
    train(table, [5])
    before = table.state_dict()
    pooled, _ = table.lookup(Bags.of([5, 6, 7, 8]), trains=False)
    assert pooled[0].tolist() == table.rows_of([5])[0].tolist()
    assert not pooled[1:].any()
    assert len(table) == 1
    assert all(np.array_equal(table.state_dict()[name], before[name]) for name in before)


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(8, 12),
    batches=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=8), max_size=25),
)
def test_eviction_drops_the_least_recently_looked_up_and_its_state(capacity, batches):
    table = EmbeddingTable(2, capacity=capacity, eviction=LeastRecent(), optimizer=Sgd(lr=1.0))
    order, updates = [], {}
    for batch in batches:
        train(table, batch, gradient=1.0)
        known = [each for each in dict.fromkeys(batch) if each in order]
        fresh = [each for each in dict.fromkeys(batch) if each not in order]
        order = [each for each in order if each not in known] + known
        for each in fresh:
            if len(order) == capacity:
                del updates[order.pop(0)]
            order.append(each)
            updates[each] = 0
        for each in batch:
            updates[each] += 1
    assert table.state_dict()["ids"].tolist() == order
    for each, count in updates.items():
        expected = table.initial_row(each)[:2] - np.float32(count)
        # one rounding of 2^-24 relative for each of at most 200 subtractions of values below 256
        assert table.rows_of([each])[0] == pytest.approx(expected, abs=200 * 256 * 2**-24)


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(8, 12),
    batches=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=8), max_size=40),
    saved_after=st.integers(0, 40),
)
def test_eviction_by_frequency_drops_the_row_of_fewest_batches_and_never_one_in_use(
    capacity, batches, saved_after
):
    def make():
        return EmbeddingTable(2, capacity=capacity, eviction=LeastFrequent(), optimizer=Sgd(lr=1.0))

    table, uses, last = make(), {}, {}
    for step, batch in enumerate(batches):
        if step == saved_after:  # what is kept goes on alike
            kept, table = table, make()
            table.load_state_dict(kept.state_dict())
        train(table, batch, gradient=1.0)
        distinct = list(dict.fromkeys(batch))
        for place, each in enumerate([*filter(uses.__contains__, distinct)]):
            uses[each], last[each] = uses[each] + 1, (step, place)
        for place, each in enumerate(each for each in distinct if each not in uses):
            if len(uses) == capacity:
                idle = [known for known in uses if last[known][0] < step]
                del uses[min(idle, key=lambda known: (uses[known], last[known]))]
            uses[each], last[each] = 0, (step, len(distinct) + place)
    assert table.state_dict()["ids"].tolist() == sorted(uses, key=lambda each: (uses[each], last[each]))
    assert held(table) == sorted(uses)


def test_rows_used_256_times_and_more_are_equals_of_which_the_longest_unused_goes():
    table = EmbeddingTable(1, capacity=2, eviction=LeastFrequent(), optimizer=Sgd(lr=1.0))
    for each in [1] * 400 + [2] * 256:
        train(table, [each])
    train(table, [3])
    assert held(table) == [2, 3]


@settings(max_examples=40, deadline=None)
@given(
    batches=st.lists(
        st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 9), min_size=1, max_size=9), min_size=1
    ),
    kept=st.integers(1, 4),
)
def test_the_index_holds_what_a_dict_would_whatever_goes(batches, kept):
    table = EmbeddingTable(1, capacity=1000, eviction=TimeToLive(kept))
    last = {}
    for step, batch in enumerate(batches, start=1):
        train(table, batch)
        last |= dict.fromkeys(batch, step)
        last = {each: at for each, at in last.items() if step - at <= kept}
        assert held(table) == sorted(last)
        assert len(table) == len(last)


def test_a_missing_row_does_not_shift_the_gradients_of_those_after_it():
    table = EmbeddingTable(1, capacity=3, eviction=LeastRecent(), optimizer=Sgd(lr=1.0))
    _, lookup = table.lookup(Bags.of([1, 2, 3]))
    train(table, [4])  # 1 is evicted before its gradient comes
    before = table.rows_of([2, 3, 4])[:, 0]
    table.apply_gradients(lookup, np.array([[100.0], [10.0], [1.0]], dtype=np.float32))
    assert (before - table.rows_of([2, 3, 4])[:, 0]).tolist() == pytest.approx([10, 1, 0], abs=1e-5)
    assert table.counts.late == 1
    assert table.counts.rows_updated == 3  # 2, 3 and the 4 of `train`


def test_ids_that_are_not_admitted_read_zeros_and_drop_only_their_own_gradient():
    table = EmbeddingTable(1, capacity=8, admission=Frequency(2), optimizer=Sgd(lr=1.0))
    train(table, [7])
    pooled, lookup = table.lookup(Bags.of([5, 7, 6]))
    assert (pooled[[0, 2]] == 0).all()
    assert pooled[1] == table.initial_row(7)[:1]
    table.apply_gradients(lookup, np.array([[100.0], [1.0], [50.0]], dtype=np.float32))
    assert table.rows_of([5, 7, 6])[:, 0].tolist() == [0, table.initial_row(7)[0] - np.float32(1), 0]
    assert table.counts.refused == 3


@settings(max_examples=30, deadline=None)
@given(batches=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=12)), count=st.integers(1, 4))
def test_no_id_is_admitted_later_than_its_count(batches, count):
    table = EmbeddingTable(1, capacity=64, admission=Frequency(count))
    seen = {}
    for batch in batches:
        train(table, batch)
        for each in set(batch):
            seen[each] = seen.get(each, 0) + 1
    assert {each for each, times in seen.items() if times >= count} <= set(held(table))


def test_admission_by_probability_is_the_same_in_every_run():
    admitted = []
    for _ in range(2):
        table = EmbeddingTable(1, capacity=4000, admission=Probability(0.25), seed=5)
        train(table, np.arange(4000))
        admitted.append(held(table))
    assert admitted[0] == admitted[1]
    # 4000 draws at 1/4: standard deviation 27.4; five of them
    assert abs(len(admitted[0]) - 1000) < 137


def test_a_full_table_that_evicts_nothing_says_so_and_stays_as_it_was():
    table = EmbeddingTable(2, capacity=3, name="users")
    train(table, [1, 2])
    with pytest.raises(DoesNotFit, match="'users' is full: it holds 2 of 3 rows.*2 new IDs"):
        table.lookup(Bags.of([1, 3, 4]))
    assert held(table) == [1, 2]


def test_a_batch_with_more_ids_than_rows_is_refused():
    table = EmbeddingTable(2, capacity=3, eviction=LeastRecent())
    train(table, [1, 2, 3])
    with pytest.raises(DoesNotFit, match="4 distinct IDs"):
        table.lookup(Bags.of([1, 3, 4, 5]))
    assert held(table) == [1, 2, 3]
    train(table, [4, 5, 3])
    assert held(table) == [3, 4, 5]


@pytest.mark.parametrize("optimizer", [Adagrad(), Adam(), Sgd(momentum=0.9)])
def test_bits_do_not_depend_on_threads_or_on_where_rows_rest(optimizer, tmp_path):
    generator = np.random.default_rng(0)
    tables = [
        EmbeddingTable(48, capacity=5000, optimizer=optimizer, threads=threads, folder=folder)
        for threads, folder in ((1, None), (3, None), (2, tmp_path))
    ]
    for _ in range(3):
        ids = generator.zipf(1.2, 4000) % 5000
        offsets = np.r_[0, np.sort(generator.integers(0, 4000, 999)), 4000]
        gradients = generator.standard_normal((1000, 48)).astype(np.float32)
        read = []
        for table in tables:
            pooled, lookup = table.lookup(Bags.of(ids, offsets), pooling="mean")
            table.apply_gradients(lookup, gradients)
            read.append(pooled)
        assert np.array_equal(read[0], read[1])
        assert np.array_equal(read[0], read[2])
    assert list(tmp_path.iterdir()) == []


def test_a_saved_table_goes_on_as_the_first_one_did():
    def make():
        return EmbeddingTable(4, capacity=6, optimizer=Adam(lr=0.1), eviction=LeastRecent())

    first, second = make(), make()
    generator = np.random.default_rng(1)
    batches = [generator.integers(0, 12, 5) for _ in range(20)]
    for batch in batches[:10]:
        train(first, batch, 1.0)
    second.load_state_dict(first.state_dict())
    for batch in batches[10:]:
        assert np.array_equal(train(first, batch, 0.5), train(second, batch, 0.5))
    assert np.array_equal(first.state_dict()["ids"], second.state_dict()["ids"])
    assert np.array_equal(first.state_dict()["rows"], second.state_dict()["rows"])


def test_rows_of_another_dim_or_optimizer_are_refused_and_replace_nothing():
    saved = EmbeddingTable(4, capacity=6)
    train(saved, [1, 2])
    table = EmbeddingTable(8, capacity=6)
    train(table, [3])
    with pytest.raises(InputError, match="dim 8 .* dim 4"):
        table.load_state_dict(saved.state_dict())
    same_dim = EmbeddingTable(4, capacity=6, optimizer=Adam())
    with pytest.raises(InputError, match="state of Adam"):
        same_dim.load_state_dict(saved.state_dict())
    with pytest.raises(InputError, match="holds 1 rows and 2"):
        EmbeddingTable(4, capacity=1).load_state_dict(saved.state_dict())
    assert held(table) == [3]


def test_gradients_of_the_wrong_shape_are_refused():
    table = EmbeddingTable(4, capacity=6)
    _, lookup = table.lookup(Bags.of([1, 2]))
    with pytest.raises(InputError, match=r"\(2, 3\).*needs \(2, 4\)"):
        table.apply_gradients(lookup, np.zeros((2, 3), dtype=np.float32))


@pytest.mark.parametrize(
    ("ids", "offsets", "message"),
    [
        ([3, -5], None, "ID -5 is negative.*uint64"),
        ([1.5], None, "float64"),
        (["x"], None, "integers"),
        ([[1, 2]], None, r"shape \(1, 2\)"),
        ([1, 2], [0, 1], "from 0 to 1"),
        ([1, 2], [0, 2, 1, 2], "fall on the way"),
        ([1, 2], [0.0, 2.0], "offsets must be a list of integers"),
    ],
)
def test_ids_and_offsets_that_are_wrong_are_refused(ids, offsets, message):
    with pytest.raises(InputError, match=message):
        Bags.of(ids, offsets, slot="city")


def test_hashes_that_use_the_top_bit_are_ids():
    table = EmbeddingTable(2, capacity=4)
    train(table, np.array([2**64 - 1, 2**63, 0], dtype=np.uint64))
    assert held(table) == [0, 2**63, 2**64 - 1]


@contextmanager
def files_no_larger_than(size_bytes):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_without_room_is_found_before_training(tmp_path):
    with files_no_larger_than(1 << 16), pytest.raises(DoesNotFit, match="1,000,000 rows of 128 bytes"):
        EmbeddingTable(16, capacity=1_000_000, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        EmbeddingTable(16, capacity=10, folder=tmp_path / "nowhere")


def test_an_index_larger_than_memory_is_refused_before_it_is_written(monkeypatch):
    monkeypatch.setattr("capstan.recommendation.table.free_host_memory", lambda: Amount(10_000, None))
    with pytest.raises(
        DoesNotFit, match="index of table 'table' for 1,000 rows needs 40,768 bytes.*10,000 are"
    ):
        EmbeddingTable(1, capacity=1000)


def test_a_table_is_not_copied_behind_its_back():
    table = EmbeddingTable(1, capacity=2)
    for copying in (copy.copy, copy.deepcopy):
        with pytest.raises(UsageError, match="cannot be copied"):
            copying(table)


def test_no_samples_and_no_ids_are_a_batch_too():
    table = EmbeddingTable(3, capacity=2)
    for bags, shape in ((Bags.of([]), (0, 3)), (Bags.of([], [0, 0, 0]), (2, 3))):
        pooled, lookup = table.lookup(bags)
        assert pooled.shape == shape
        assert not pooled.any()
        table.apply_gradients(lookup, pooled)
    assert len(table) == 0


def test_more_memory_than_addresses_is_refused(monkeypatch):
    monkeypatch.setattr("capstan.recommendation.table.free_host_memory", lambda: Amount(2**60, None))
    with pytest.raises(DoesNotFit, match="Lower capacity"):
        EmbeddingTable(1 << 16, capacity=2**31 - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim 0"),
        ({"capacity": 0}, "capacity of 0"),
        ({"threads": 0}, "0 threads"),
    ],
)
def test_tables_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        EmbeddingTable(**{"dim": 4, "capacity": 4} | arguments)
