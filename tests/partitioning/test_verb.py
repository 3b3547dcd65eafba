"""`capstan partition` in process: what it prints, what it refuses."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from capstan.cli.partition import partition
from capstan.errors import InputError, UsageError
from capstan.partitioning import group, join, open_table, record

JOBS = """
from capstan.partitioning import group


def tens(row):
    return row["k"] // 10


def counted(tables):
    return group(tables["t"], key=tens, reduce=len)


calls = []


def unlike(tables):
    calls.append(1)
    return calls
"""


def _say(*words):
    ran = CliRunner().invoke(partition, [str(each) for each in words], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return ran.stdout


@pytest.fixture
def table(tmp_path, monkeypatch):
    (tmp_path / "verb_jobs.py").write_text(JOBS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    pq.write_table(pa.table({"k": list(range(500))}), "t.parquet")
    return open_table("t.parquet")


def test_advice_is_one_object_with_choice_speedup_alternatives_and_reasons(table):
    other = open_table("t.parquet", name="other")
    with record("runs.db"):
        list(join(table, other, key="k", other="k", combine=lambda one, two: None))
    told = json.loads(_say("advise", "runs.db", "--json", "--expected-runs", "1000000"))
    assert {"verb", "choice", "expected_speedup", "alternatives", "reasons", "plan"} <= set(told)
    assert set(told["choice"]) == {"t", "other"}
    assert told["choice"]["t"]["key"] == "row['k']"
    assert told["expected_speedup"] > 1
    assert "none" in [each["name"] for each in told["alternatives"]]
    assert "no shuffle" in _say("advise", "runs.db", "--expected-runs", "1000000")


def test_an_empty_history_gives_none(table):
    with record("runs.db"):
        pass
    told = json.loads(_say("advise", "runs.db", "--json"))
    assert (told["choice"], told["expected_speedup"]) == ("none", 1.0)
    assert told["reasons"]


def test_apply_verify_and_rollback(table):
    said = _say("apply", "t.parquet", "--key", "verb_jobs:tens", "--into", "laid", "--buckets", "4")
    assert "t lies by (row['k'] // 10) in 4 buckets" in said
    told = json.loads(_say("verify", "laid", "--job", "verb_jobs:counted", "--repeats", "1", "--json"))
    assert told["is_same"]
    assert told["before"]["shuffled_bytes"] > 0 == told["after"]["shuffled_bytes"]
    assert {"seconds", "results"} <= set(told["after"])
    assert "equal" in _say("verify", "laid", "--query", "SELECT sum(k) FROM t", "--repeats", "1")
    assert json.loads(_say("rollback", "laid", "--json"))["layout"] is None
    assert len(list(group(open_table("laid"), key="k"))) == 500


def test_results_that_differ_are_an_error(table):
    _say("apply", "t.parquet", "--key", "k", "--into", "laid")
    with pytest.raises(InputError, match="Results differ"):
        _say("verify", "laid", "--job", "verb_jobs:unlike", "--repeats", "1")


def test_wrong_words_are_refused(table):
    with pytest.raises(UsageError, match="either --query"):
        _say("verify", "t.parquet")
    with pytest.raises(UsageError, match="MODULE:FUNCTION"):
        _say("apply", "t.parquet", "--key", "verb_jobs:nothing", "--into", "laid")
    with pytest.raises(InputError, match="There is no history"):
        _say("advise", "missing.db")
    with pytest.raises(InputError, match="cannot be read"):
        _say("advise", "missing.db", "--machine", "missing.json")
    with pytest.raises(UsageError, match="0 buckets"):
        _say("apply", "t.parquet", "--key", "k", "--into", "laid", "--buckets", "0")
