"""`capstan shuffle`: plan, run, JSON, going on after a kill, and what is refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from capstan.cli.shuffle import app
from capstan.errors import CapstanError, DoesNotFit, InputError, UsageError
from capstan.hardware.free_memory import Amount
from capstan.plans import Plan, Trace

from .tables import sorted_table


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPSTAN_CACHE", str(tmp_path / "cache"))
    table = sorted_table(3000)
    table["y"] = np.array(["low", "high"])[table["y"]]
    pq.write_table(pa.table(table), tmp_path / "rows.parquet", row_group_size=30)
    np.savez(tmp_path / "rows.npz", **table)
    return tmp_path


def run(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(done.exception, CapstanError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.parametrize("suffix", ["parquet", "npz"])
def test_train_tells_plan_trace_and_scores_and_bytes_agree(files, suffix):
    source, test = files / f"rows.{suffix}", files / "rows.parquet"
    done = run("train", source, "--label", "y", "--test", test, "--epochs", 2, "--json")
    told = json.loads(done.stdout)
    assert told["verb"] == "shuffle train"
    plan, trace = Plan.from_dict(told["plan"]), Trace.from_dict(told["trace"])
    assert [phase.name for phase in plan.phases] == ["statistics", "epochs", "evaluation"]
    for predicted in plan.phases:
        measured = trace.phase(predicted.name)
        assert measured.traffic == predicted.traffic
        assert measured.counts == predicted.counts
    assert told["accuracy"] > 0.7
    assert told["rows_per_s"] > 0
    assert [each["epoch"] for each in told["epochs"]] == [0, 1]
    assert told["epochs"][-1]["accuracy"] == told["accuracy"]
    assert np.shape(told["model"]["weights"]) == (6, 1)
    assert "measured peak" in done.stderr
    assert not list((files / "cache" / "shuffle-train").iterdir())


def test_every_strategy_reads_what_it_planned_and_without_test_rows_the_source_is_scored(files):
    for strategy in ("corgipile", "full", "none", "block", "window", "reservoir"):
        words = ("train", files / "rows.npz", "--label", "y", "--strategy", strategy, "--epochs", 1, "--json")
        told = json.loads(run(*words).stdout)
        assert told["trace"]["bytes"] == told["plan"]["bytes"]
        assert 0.3 < told["accuracy"] < 1


def test_explain_runs_nothing(files):
    before = sorted(files.rglob("*"))
    words = ("train", files / "rows.parquet", "--label", "y", "--explain")
    assert "shuffle the file first" in run(*words).stdout
    told = json.loads(run(*words, "--json").stdout)
    assert told["trace"] is None
    assert told["plan"]["decision"]["buffer_blocks"] == 10
    assert sorted(files.rglob("*")) == before


def test_features_buffers_in_bytes_and_a_kept_checkpoint(files):
    words = ("train", files / "rows.parquet", "--label", "y", "--features", "f0,f2", "--epochs", 1)
    words = (*words, "--buffer", "10KiB", "--checkpoint", files / "state.npz", "--json")
    told = json.loads(run(*words).stdout)
    assert told["model"]["examples"]["features"] == ["f0", "f2"]
    assert 0 < told["plan"]["peak_bytes"]["host"] <= 20 * 1024
    again = json.loads(run(*words).stdout)
    assert again["accuracy"] == told["accuracy"]
    assert again["rows_per_s"] is None  # nothing was left to train
    with pytest.raises(InputError, match="of another run"):
        run(*words, "--seed", 1)


def test_linear_regression_has_an_error_instead_of_an_accuracy(files):
    told = json.loads(
        run("train", files / "rows.parquet", "--label", "f4", "--model", "linear", "--json").stdout
    )
    assert told["accuracy"] is None
    assert set(told["score"]) == {"mean_squared_error", "r2"}


def test_doctor_says_how_clustered_and_which_buffer(files):
    told = json.loads(run("doctor", files / "rows.parquet", "--label", "y", "--json").stdout)
    assert told["verb"] == "shuffle doctor"
    assert told["h_d"] > 3
    assert told["blocks_read"] == 32
    assert told["num_blocks"] == 100
    assert Plan.from_dict(told["plan"]).seconds > 0
    assert told["effective_rows"]["10"] > told["effective_rows"]["1"]
    text = run("doctor", files / "rows.parquet", "--label", "y", "--buffer", "0.01").stdout
    assert "h_D" in text
    assert "take" in text


def test_one_block_is_a_full_shuffle_and_says_so(files):
    pq.write_table(pq.read_table(files / "rows.parquet"), files / "one.parquet")
    words = (files / "one.parquet", "--label", "y")
    assert "one block: a buffer is the whole table" in run("doctor", *words).stdout
    told = json.loads(run("train", *words, "--epochs", 1, "--json").stdout)
    assert told["plan"]["decision"]["num_blocks"] == 1
    assert told["accuracy"] > 0.7


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (("train", "nowhere.parquet", "--label", "y"), InputError, "There is no file"),
        (("train", "rows.parquet", "--label", "z"), UsageError, "'z'"),
        (("train", "rows.parquet", "--label", "y", "--features", "f9"), UsageError, "'f9'"),
        (("train", "rows.parquet", "--label", "y", "--features", ""), UsageError, "No column beside"),
        (("train", "rows.parquet", "--label", "y", "--model", "tree"), UsageError, "no model 'tree'"),
        (("train", "rows.parquet", "--label", "y", "--strategy", "x"), UsageError, "no strategy 'x'"),
        (("train", "rows.parquet", "--label", "y", "--buffer", "2"), UsageError, "share of the blocks"),
        (("train", "rows.parquet", "--label", "y", "--buffer", "0"), UsageError, "share of the blocks"),
        (("train", "rows.parquet", "--label", "y", "--buffer", "much"), UsageError, "not a size"),
        (("train", "rows.parquet", "--label", "f0"), InputError, "two classes"),
        (("train", "rows.parquet", "--label", "y", "--test", "short.npz"), UsageError, "Known: f0, f1, y"),
        (("doctor", "rows.parquet", "--label", "z"), UsageError, "'z'"),
    ],
)
def test_what_is_wrong_is_refused(files, words, error, says):
    np.savez(files / "short.npz", f0=np.zeros(3), f1=np.zeros(3), y=np.array(["low"] * 3))
    with pytest.raises(error) as caught:
        run(*(files / word if "." in word else word for word in words))
    assert says in str(caught.value)


def test_what_does_not_fit_is_refused(files, monkeypatch):
    monkeypatch.setattr("capstan.shuffling.planner.free_host_memory", lambda: Amount(1000, None))
    with pytest.raises(DoesNotFit, match="Take a smaller --buffer or --strategy corgipile"):
        run("train", files / "rows.parquet", "--label", "y", "--strategy", "full")
