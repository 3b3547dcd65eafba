"""A history keeps what ran, whole or not at all, and refuses what is not one."""

import sqlite3
from multiprocessing.dummy import Pool

import pytest

from capstan.errors import DoesNotFit, InputError, UsageError
from capstan.partitioning import History, JobRun, Side, record
from capstan.partitioning.recording import recorder

SIDE = Side(table="orders", key="ab", key_text="row['okey']", num_rows=10, size_bytes=80, num_keys=7)
RUN = JobRun(
    name="sites",
    kind="join",
    seconds=2.5,
    sides=(SIDE, Side(table="lines", key="cd", largest_share=0.5, is_reusable=False, num_rows=30)),
    shuffle_s=1.5,
    shuffle_bytes=800,
    result_rows=20,
    layout={"orders": "ab"},
)


def test_runs_come_back_as_they_were_added(tmp_path):
    history = History(tmp_path / "runs.db", create=True)
    history.extend([RUN, JobRun(name="other", kind="query", seconds=0.0)])
    again = History(tmp_path / "runs.db").runs()
    assert again == [RUN, JobRun(name="other", kind="query", seconds=0.0)]
    assert again[0].selectivity == 0.5
    assert again[1].selectivity is None


def test_a_block_and_a_function_are_recorded(tmp_path):
    path = tmp_path / "runs.db"
    recorder()(RUN)  # nobody records
    with record(path):
        recorder()(RUN)

    @record(path)
    def work():
        recorder()(RUN)

    work()
    work()
    assert len(History(path).runs()) == 3


def test_a_generator_is_not_decorated_because_it_would_run_too_late(tmp_path):
    def work():
        yield 1

    with pytest.raises(UsageError, match="is a generator"):
        record(tmp_path / "runs.db")(work)


def test_the_innermost_recording_gets_the_job(tmp_path):
    with record(tmp_path / "outer.db"):
        with record(tmp_path / "inner.db"):
            recorder()(RUN)
        assert History(tmp_path / "outer.db").runs() == []
    assert History(tmp_path / "inner.db").runs() == [RUN]


def test_a_recording_that_is_not_open_takes_nothing(tmp_path):
    with pytest.raises(UsageError, match="not open"):
        record(tmp_path / "runs.db").add(RUN)


def test_several_may_open_a_new_file_and_add_to_it_at_once(tmp_path):
    path = tmp_path / "runs.db"

    def add(_):
        History(path, create=True).add(RUN)

    with Pool(4) as pool:
        pool.map(add, range(12))
    assert len(History(path).runs()) == 12


def test_a_missing_history_is_named(tmp_path):
    with pytest.raises(InputError, match="There is no history .*runs.db.*Record one"):
        History(tmp_path / "runs.db")


def test_a_damaged_history_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "runs.db"
    path.write_bytes(b"SQLite format 3\0" + b"\x07" * 4000)
    before = path.read_bytes()
    with pytest.raises(InputError, match="damaged"):
        History(path, create=True)
    assert path.read_bytes() == before


def test_a_history_damaged_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "runs.db"
    History(path, create=True).extend([RUN] * 200)
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        History(path).runs()


def test_another_programs_file_and_another_version_are_refused(tmp_path):
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    with pytest.raises(InputError, match="another program"):
        History(other)
    History(tmp_path / "runs.db", create=True)
    with sqlite3.connect(tmp_path / "runs.db") as connection:
        connection.execute("PRAGMA user_version=9")
    with pytest.raises(InputError, match="version 9"):
        History(tmp_path / "runs.db")


def test_a_full_disk_adds_no_run(tmp_path, monkeypatch):
    path = tmp_path / "runs.db"
    history = History(path, create=True)
    history.add(RUN)
    connect = sqlite3.connect

    def small(*arguments, **named):
        connection = connect(*arguments, **named)
        connection.execute("PRAGMA max_page_count=1")  # SQLite says "full" as it does for a disk
        return connection

    monkeypatch.setattr(sqlite3, "connect", small)
    with pytest.raises(DoesNotFit, match="full"):
        history.extend([RUN] * 2000)
    monkeypatch.undo()
    assert history.runs() == [RUN]


@pytest.mark.parametrize(
    "wrong", [{"seconds": float("nan")}, {"seconds": -1.0}, {"kind": "sort"}], ids=["nan", "negative", "kind"]
)
def test_runs_that_cannot_be_are_refused(wrong):
    with pytest.raises(UsageError, match="job|Job"):
        JobRun(**{"name": "x", "kind": "join", "seconds": 1.0} | wrong)
