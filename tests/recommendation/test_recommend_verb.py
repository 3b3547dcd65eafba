"""`capstan recommend` in this process."""

import json

import pytest
from typer.testing import CliRunner

from capstan.cli.recommend import app
from capstan.errors import CapstanError


@pytest.fixture
def recommend(monkeypatch, given_machine):
    monkeypatch.setattr("capstan.hardware.this_machine", lambda **_: given_machine)

    def run(*words):
        done = CliRunner().invoke(app, [str(word) for word in words])
        if isinstance(done.exception, CapstanError):
            raise done.exception
        return done

    return run


def test_training_prints_one_json_object(recommend, clicks, tmp_path):
    options = ("--mode", "hybrid", "--staleness", 2, "--batch-size", 256, "--epochs", 2, "--memory", "1GiB")
    files = ("--data", clicks.train, "--config", clicks.config, "--test", clicks.test, "--output", tmp_path)
    shown = json.loads(recommend("train", *files, *options, "--json").stdout)
    assert shown["verb"] == "recommend"
    assert shown["plan"]["bytes"] == shown["trace"]["bytes"]
    assert shown["auc"] > 0.7
    assert shown["samples_per_s"] > 0
    assert shown["staleness"]["peak_in_flight"] == shown["staleness"]["bound"] == 2
    assert len(shown["losses"]) == 2
    exported = recommend(
        "export", "--from", tmp_path / "recommender.pt", "--output", tmp_path / "rows", "--json"
    )
    assert json.loads(exported.stdout)["rows"]["tags"] == 40
    assert (tmp_path / "rows" / "item.parquet").is_file()


def test_explaining_trains_nothing(recommend, clicks):
    files = ("--data", clicks.train, "--config", clicks.config)
    assert "bottleneck" in recommend("train", *files, "--explain").stdout
    shown = json.loads(recommend("train", *files, "--explain", "--json").stdout)
    assert shown["trace"] is None
    assert shown["plan"]["decision"]["capacity"]["tags"] == 40


def test_people_read_predicted_beside_measured(recommend, clicks):
    words = recommend(
        "train", "--data", clicks.train, "--config", clicks.config, "--test", clicks.test
    ).stdout
    assert "predicted" in words
    assert "samples/s" in words
    assert "AUC 0." in words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mode", "hybird"), "Did you mean 'hybrid'"),
        (("--staleness", 4), "Give --mode hybrid"),
        (("--memory", "much"), "is not a size"),
        (("--disk", "/nowhere/at/all"), "/nowhere/at/all"),
        (("--test", "nowhere.parquet"), "nowhere.parquet"),
    ],
)
def test_wrong_options_are_named(recommend, clicks, words, message):
    with pytest.raises(CapstanError, match=message):
        recommend("train", "--data", clicks.train, "--config", clicks.config, *words)
