"""Layouts change where rows lie, never what a job gives; switching is whole or not at all."""

import datetime
import functools
import json
import math
import random
import resource
import tracemalloc
import uuid
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capstan.errors import DoesNotFit, InputError, UsageError
from capstan.partitioning import (
    History,
    apply,
    group,
    join,
    open_table,
    query,
    read_key,
    record,
    rollback,
    verify,
)
from capstan.partitioning.buckets import bucket_of, murmur3
from capstan.partitioning.recording import collect
from capstan.partitioning.scattering import bucket_folder

NAN = float("nan")


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        (34, 2017239379),
        (datetime.date(2017, 11, 16), -653330422),
        (datetime.time(22, 31, 8), -662762989),
        (datetime.datetime(2017, 11, 16, 22, 31, 8), -2047944441),
        ("iceberg", 1210000089),
        (uuid.UUID("f79c3e09-677c-4bbd-a479-3f349cb785e7"), 1488055340),
        (b"\x00\x01\x02\x03", -188683207),
    ],
)
def test_buckets_are_those_of_icebergs_specification(key, wanted):
    # The values of appendix B of the specification; 2**31 buckets show the whole hash.
    assert bucket_of(key, 2**31) == wanted & 0x7FFFFFFF


def test_the_hash_of_no_bytes_and_of_a_tail():
    # Of the reference implementation, smhasher's MurmurHash3_x86_32.
    assert murmur3(b"") == 0
    assert murmur3(b"", 1) == 0x514E28B7
    assert murmur3(b"test", 0) == 0xBA6BD213 - 2**32


@given(st.integers(-(2**70), 2**70))
def test_equal_numbers_share_a_bucket(number):
    equal = [number, Decimal(number)] + ([float(number)] if float(number) == number else [])
    assert len({bucket_of(each, 64) for each in equal}) == 1
    assert bucket_of(True, 64) == bucket_of(1, 64) == bucket_of(1.0, 64)


def _write(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return open_table(path)


def _collection(rows):
    return Counter(map(repr, rows))


def _wanted(left, right, key, other):
    return _collection(
        (one, two)
        for one in left
        for two in right
        if key(one) is not None
        and (key(one) == other(two) or (key(one) != key(one) and other(two) != other(two)))
    )


KEYS = {
    "integers and nulls": ([1, 2, 2, None, 7, 10**15], [2, 2, None, 7, 7, 8]),
    "narrow against wide integers": (
        pa.array([1, 2, 3, -1], pa.int8()),
        pa.array([3, -1, 2**40, 1], pa.int64()),
    ),
    "integers against floats": ([1, 2, 3], [1.0, 2.5, 3.0]),
    "nan and zeros": ([NAN, 0.0, -0.0, None, math.inf], [NAN, NAN, -0.0, None, math.inf]),
    "text": (["a", "", None, "ü", "a"], ["a", "ü", "b", None, ""]),
    "days": ([datetime.date(2020, 1, 1), None], [datetime.date(2020, 1, 1), datetime.date(1969, 1, 1)]),
    "nothing on one side": (pa.array([], pa.int64()), [1, 2]),
    "only nulls": (pa.array([None, None], pa.int64()), pa.array([None], pa.int64())),
    "one key": ([5] * 20, [5] * 3),
}


@pytest.mark.parametrize("case", KEYS)
@pytest.mark.parametrize("laid_out", ["neither", "left", "right", "both", "both, one in fewer buckets"])
def test_a_join_gives_the_same_whatever_lies_by_its_key(tmp_path, case, laid_out):
    left, right = (
        _write(tmp_path / f"{name}.parquet", {"k": keys, "n": list(range(len(keys)))})
        for name, keys in zip(("left", "right"), KEYS[case], strict=True)
    )
    rows = [pq.read_table(each.source).to_pylist() for each in (left, right)]
    key = read_key("k")
    if laid_out.startswith(("left", "both")):
        left = apply(left, key, tmp_path / "laid" / "left", num_buckets=8)
    if laid_out.startswith(("right", "both")):
        right = apply(right, key, tmp_path / "laid" / "right", num_buckets=2 if "fewer" in laid_out else 8)
    with collect() as jobs:
        found = _collection(join(left, right, key=lambda o: o["k"], other=lambda r: r["k"], num_buckets=4))
    assert found == _wanted(*rows, lambda o: o["k"], lambda r: r["k"])
    (job,) = jobs
    assert (job.shuffle_bytes == 0) == all(
        table.layout or not count for table, count in zip((left, right), map(len, rows), strict=True)
    )
    assert set(job.layout) == {each.name for each in (left, right) if each.layout is not None}


def test_a_group_keeps_nulls_and_nans_as_keys_of_their_own(tmp_path):
    table = _write(
        tmp_path / "t.parquet", {"k": [1.0, None, NAN, NAN, 1.0, None], "j": [1, 1, 2, 2, None, 2]}
    )
    plain = group(table, key="k", reduce=len)
    assert _collection(plain) == _collection([(1.0, 2), (None, 2), (_nan(), 2)])
    pairs = dict(group(table, key=lambda row: (row["k"] == 1.0, row["j"]), reduce=len))
    assert pairs == {(True, 1): 1, (False, 1): 1, (False, 2): 3, (True, None): 1}
    laid_out = apply(table, read_key("k"), tmp_path / "laid", num_buckets=4)
    with collect() as jobs:
        assert _collection(group(laid_out, key="k", reduce=len)) == _collection(
            [(1.0, 2), (None, 2), (_nan(), 2)]
        )
    assert jobs[0].shuffle_bytes == 0


def _nan():
    return NAN


@given(st.lists(st.integers(-3, 3) | st.none(), max_size=30), st.lists(st.integers(-3, 3), max_size=30))
def test_random_joins_equal_the_nested_loop(tmp_path_factory, left, right):
    folder = tmp_path_factory.mktemp("random")
    tables = [
        _write(folder / f"{name}.parquet", {"k": pa.array(keys, pa.int64())})
        for name, keys in (("l", left), ("r", right))
    ]
    laid_out = [apply(each, read_key("k"), folder / each.name, num_buckets=3) for each in tables]
    rows = [[{"k": key} for key in keys] for keys in (left, right)]
    wanted = _wanted(*rows, lambda o: o["k"], lambda r: r["k"])
    assert _collection(join(*laid_out, key="k", other="k")) == wanted


@dataclass(frozen=True)
class Pair:
    a: int
    b: int


@dataclass
class Order:
    okey: int
    url: str

    def site(self):
        return self.url.split("/")[2].lower()


def _orders(tmp_path, count=50):
    urls = [f"http://Site{number % 7}/{number}" for number in range(count)]
    return _write(tmp_path / "orders.parquet", {"okey": list(range(count)), "url": urls})


def test_functions_that_compute_the_same_use_one_layout_and_others_do_not(tmp_path):
    plain = _orders(tmp_path)
    laid_out = apply(plain, read_key(lambda o: o["url"].split("/")[2].lower()), tmp_path / "laid")

    def site(row):
        parts = row["url"].split("/")
        return parts[2].lower()

    laid_out.require(read_key(site))
    with pytest.raises(InputError, match="stale: apply it again"):
        laid_out.require(read_key(lambda o: o["url"].split("/")[2].upper()))
    with collect() as jobs:
        same = dict(group(laid_out, key=site, reduce=len))
        changed = dict(group(laid_out, key=lambda o: o["url"].split("/")[2].upper(), reduce=len))
    assert [bool(job.shuffle_bytes) for job in jobs] == [False, True]
    assert same == dict(group(plain, key=site, reduce=len))
    assert {key.upper() for key in same} == set(changed)


def test_rows_may_be_objects_whose_methods_are_keys(tmp_path):
    _orders(tmp_path)
    orders = open_table(tmp_path / "orders.parquet", row=Order)
    laid_out = apply(orders, read_key(lambda o: o.site(), of=Order), tmp_path / "laid", num_buckets=4)
    with collect() as jobs:
        counted = dict(group(laid_out, key=Order.site, reduce=len))
    assert jobs[0].shuffle_bytes == 0
    assert counted == {f"site{number}": 8 if number == 0 else 7 for number in range(7)}


def test_opaque_keys_are_stored_and_matched_by_their_code(tmp_path):
    def digits(row):
        total = 0
        for digit in str(row["okey"]):
            total = total + int(digit)
        return total

    key = read_key(digits)
    assert key.level == "opaque"
    laid_out = apply(_orders(tmp_path), key, tmp_path / "laid", num_buckets=4)
    assert laid_out.layout.key_column == f"__key_{key.identity}"
    with collect() as jobs:
        assert sum(count for _, count in group(laid_out, key=digits, reduce=len)) == 50
    assert jobs[0].shuffle_bytes == 0


def test_a_key_that_may_change_is_not_laid_out(tmp_path):
    with pytest.raises(UsageError, match="may change.*random"):
        apply(_orders(tmp_path), read_key(lambda o: (o["okey"], random.random())), tmp_path / "laid")
    assert not (tmp_path / "laid").exists()


def test_keys_that_cannot_be_hashed_and_those_that_change_type_are_refused(tmp_path):
    with pytest.raises(InputError, match="A key is a list"):
        apply(_orders(tmp_path), read_key(lambda o: o["url"].split("/")), tmp_path / "laid")
    table = _write(tmp_path / "t.parquet", {"k": list(range(10_000))})
    key = read_key(lambda row: row["k"] if row["k"] < 9000 else str(row["k"]))
    with pytest.raises(InputError, match="change their type"):
        apply(table, key, tmp_path / "laid")
    assert list((tmp_path / "laid").glob("rows-*")) == []
    laid_out = apply(table, key, tmp_path / "laid", is_key_stored=False)
    assert sum(laid_out.layout.num_rows.values()) == 10_000


def test_empty_buckets_have_no_files(tmp_path):
    table = _write(tmp_path / "t.parquet", {"k": [5, 5]})
    laid_out = apply(table, read_key("k"), tmp_path / "laid", num_buckets=100)
    assert len(laid_out.files()) == 1
    assert laid_out.layout.skew == 100
    assert list(bucket_folder(tmp_path / "laid" / laid_out.layout.data, bucket_of(5, 100)).iterdir())


def test_an_apply_that_fails_leaves_the_layout_before(tmp_path, monkeypatch):
    orders = _orders(tmp_path)
    first = apply(orders, read_key("okey"), tmp_path / "laid")
    calls = Counter()

    def failing(row):
        calls["rows"] += 1
        if calls["rows"] > 30:
            raise RuntimeError("stop")
        return row["okey"]

    key = read_key("okey")
    object.__setattr__(key, "function", failing)
    with pytest.raises(RuntimeError, match="stop"):
        apply(orders, key, tmp_path / "laid")
    assert open_table(tmp_path / "laid").layout == first.layout
    assert [path.name for path in (tmp_path / "laid").glob("rows-*")] == [first.layout.data]


def test_a_full_disk_switches_nothing(tmp_path):
    rows = {"k": list(range(20_000)), "text": [f"{random.random()}" * 5 for _ in range(20_000)]}
    table = _write(tmp_path / "t.parquet", rows)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # a file that may not grow is a full disk
    try:
        with pytest.raises(DoesNotFit, match="Free space"):
            apply(table, read_key("k"), tmp_path / "laid", num_buckets=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "laid").iterdir()) == []


def test_rollback_goes_to_the_layout_before_then_to_the_source_then_nowhere(tmp_path):
    orders = _orders(tmp_path)
    first = apply(orders, read_key("okey"), tmp_path / "laid", num_buckets=4)
    apply(orders, read_key("url"), tmp_path / "laid", num_buckets=8)
    assert rollback(tmp_path / "laid").layout == first.layout
    plain = rollback(tmp_path / "laid")
    assert plain.layout is None
    assert plain.files() == orders.files()
    with pytest.raises(InputError, match="rolled back to its source already"):
        rollback(tmp_path / "laid")
    with pytest.raises(InputError, match="holds no layout"):
        rollback(tmp_path / "nowhere")


def test_a_source_that_changed_makes_its_layout_stale(tmp_path):
    apply(_orders(tmp_path), read_key("okey"), tmp_path / "laid")
    _orders(tmp_path, count=60)
    with pytest.raises(InputError, match="changed since"):
        open_table(tmp_path / "laid")
    assert rollback(tmp_path / "laid").layout is None


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"format": "other", "version": 1}'])
def test_a_damaged_manifest_is_refused(tmp_path, damage):
    apply(_orders(tmp_path), read_key("okey"), tmp_path / "laid")
    (tmp_path / "laid" / "layout.json").write_text(damage)
    with pytest.raises(InputError, match="no manifest"):
        open_table(tmp_path / "laid")


def test_a_layout_by_another_hash_is_not_matched(tmp_path):
    apply(_orders(tmp_path), read_key("okey"), tmp_path / "laid")
    manifest = json.loads((tmp_path / "laid" / "layout.json").read_text())
    manifest["layout"]["hash"] = "other"
    (tmp_path / "laid" / "layout.json").write_text(json.dumps(manifest))
    assert not open_table(tmp_path / "laid").lies_by(read_key("okey"))


def test_a_bucket_that_was_lost_is_an_error_and_not_a_bucket_without_rows(tmp_path):
    laid_out = apply(_orders(tmp_path), read_key("okey"), tmp_path / "laid")
    laid_out.files()[3].unlink()
    with pytest.raises(InputError, match="cannot be read"):
        list(group(laid_out, key="okey"))


def test_files_that_are_no_parquet_are_refused(tmp_path):
    with pytest.raises(InputError, match="no Parquet files"):
        open_table(tmp_path / "missing.parquet")
    (tmp_path / "t.parquet").write_text("text")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        list(group(open_table(tmp_path / "t.parquet"), key="k"))


def test_a_recorded_join_says_sizes_keys_and_bytes(tmp_path):
    left = _write(tmp_path / "left.parquet", {"k": [1, 1, 2, None]})
    right = _write(tmp_path / "right.parquet", {"k": [1, 3]})
    with record(tmp_path / "runs.db"):
        assert len(list(join(left, right, key="k", other="k", name="pairs"))) == 2
        next(join(left, right, key="k", other="k", name="never finished"))
    (run,) = History(tmp_path / "runs.db").runs()
    assert (run.name, run.result_rows, run.selectivity) == ("pairs", 2, 2 / 6)
    assert [(side.num_rows, side.num_keys) for side in run.sides] == [(4, 2), (2, 2)]
    assert run.sides[0].key == run.sides[1].key
    assert run.shuffle_bytes > 0
    assert 0 < run.shuffle_s <= run.seconds


def test_a_job_belongs_to_the_recording_in_which_it_was_called(tmp_path):
    table = _write(tmp_path / "t.parquet", {"k": [1, 2]})
    with record(tmp_path / "runs.db"):
        inside = group(table, key="k", name="inside")
    outside = group(table, key="k", name="outside")
    assert len(list(inside)) == len(list(outside)) == 2
    assert [run.name for run in History(tmp_path / "runs.db").runs()] == ["inside"]


def test_verify_shows_that_the_shuffle_is_gone_and_results_are_equal(tmp_path):
    orders = apply(_orders(tmp_path), read_key("okey"), tmp_path / "laid")
    found = verify(
        lambda tables: group(tables["orders"], key="okey", reduce=len), [orders], repeats=1
    ).to_dict()
    assert found["is_same"]
    assert found["before"]["shuffled_bytes"] > 0 == found["after"]["shuffled_bytes"]
    assert found["before"]["results"] == found["after"]["results"] == 50
    unequal = verify(lambda tables: [tables["orders"].layout], [orders], repeats=1)
    assert not unequal.is_same
    with pytest.raises(InputError, match="nothing to verify"):
        verify(lambda tables: [], [open_table(tmp_path / "orders.parquet")])


def test_sql_sees_the_users_columns_only(tmp_path):
    orders = apply(_orders(tmp_path), read_key(lambda o: o["url"].split("/")[2]), tmp_path / "laid")
    assert verify(query("SELECT * FROM orders"), [orders], repeats=1).is_same
    assert (
        verify(query("SELECT count(*), max(url) FROM orders"), [orders], repeats=1).after.counts["results"]
        == 1
    )
    with pytest.raises(InputError, match="DuckDB cannot run"):
        verify(query("SELECT nothing FROM nowhere"), [orders], repeats=1)


def test_memory_is_that_of_a_bucket_not_of_a_table(tmp_path):
    left = _write(tmp_path / "left.parquet", {"k": list(range(100))})
    right = _write(tmp_path / "right.parquet", {"k": list(range(30_000))})
    peaks = {}
    for num_buckets in (1, 16):
        laid_out = [
            apply(each, read_key("k"), tmp_path / each.name, num_buckets=num_buckets)
            for each in (left, right)
        ]
        tracemalloc.start()
        for _ in join(*laid_out, key="k", other="k"):
            pass
        peaks[num_buckets] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # A sixteenth of the rows, and as many again while a file is read: an eighth, were there nothing else.
    assert peaks[16] < peaks[1] / 4


def test_a_table_joined_with_itself_is_shuffled_once_unless_its_keys_differ(tmp_path):
    table = _write(tmp_path / "t.parquet", {"a": [1, 2, 3, 4], "b": [2, 3, 4, 5]})
    first, second = (functools.lru_cache(each) for each in (lambda row: row.a, lambda row: row.b))
    with collect() as jobs:
        assert len(list(join(table, table, key="a", other="a"))) == 4
        assert len(list(join(table, table, key="a", other="b"))) == 3
    assert jobs[1].shuffle_bytes == pytest.approx(2 * jobs[0].shuffle_bytes, rel=0.5)
    # Code that is not Python's own is not told apart by identity, and must not share a shuffle.
    pairs = open_table(tmp_path / "t.parquet", row=Pair)
    assert len(list(join(pairs, pairs, key=first, other=second))) == 3
