"""`capstan generate`: what it refuses and how, what --explain leaves alone, what goes to which stream."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("small_machine")

SMALL = ["--device", "cpu", "--device-memory", "2MiB", "--host-memory", "1MiB"]


def test_without_an_output_only_the_plan_can_be_asked_for(
    run: Callable[..., Any], model: Path, requests: Path
) -> None:
    ran = run("generate", "--model", model, "--input", requests, *SMALL)
    assert ran.code == 2
    assert "--output" in ran.err
    assert "--explain" in ran.err
    assert ran.out == ""


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--device-memory", "8GB x"], "'8GB x' is not a size"),
        (["--host-memory", "lots"], "'lots' is not a size"),
        (["--device", "gpu"], "'cuda', 'cpu' or 'auto', not 'gpu'"),
        (["--place", "weight=host"], "Did you mean 'weights'?"),
        (["--place", "weights=hots"], "Did you mean 'host'?"),
        (["--place", "weights=device:0.3,host:0.3"], "add up to 0.6"),
        (["--place", "weights=device:half,host:0.5"], "'half'"),
        (["--place", "cache"], "write for example cache=host"),
        (["--place", "attention=disk"], "'device' or 'host', not on 'disk'"),
        (["--weight-bits", "5"], "5"),
        (["--cache-bits", "3"], "3"),
    ],
)
def test_a_wrong_option_is_refused_in_words(
    words: list[str],
    named: str,
    run: Callable[..., Any],
    model: Path,
    requests: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "answers.jsonl"
    ran = run("generate", "--model", model, "--input", requests, "--output", output, *SMALL, *words)
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert named in ran.words
    assert ran.out == ""
    assert not output.exists()


def test_a_budget_that_is_too_small_leaves_a_job_that_a_larger_one_finishes(
    run: Callable[..., Any], model: Path, requests: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    words = ["generate", "--model", model, "--input", requests, "--output", output]
    refused = run(*words, *SMALL, "--device-memory", "20KiB")
    assert refused.code == 1
    assert refused.err.startswith("error: ")
    assert "20.00 KiB" in refused.words
    assert refused.out == ""
    assert output.read_text() == ""
    assert run(*words, *SMALL).code == 0
    assert len(output.read_text().splitlines()) == 4


def test_a_model_folder_that_is_not_there_is_named(run: Callable[..., Any], requests: Path) -> None:
    ran = run("generate", "--model", "no/such/folder", "--input", requests, *SMALL, "--explain")
    assert ran.code == 1
    assert "no/such/folder" in ran.words
    assert "Hugging Face format" in ran.words
    assert ran.out == ""


def test_an_input_file_that_is_not_there_is_named(
    run: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    ran = run("generate", "--model", model, "--input", tmp_path / "none.jsonl", "--output", output, *SMALL)
    assert ran.code == 1
    assert "none.jsonl cannot be read: No such file or directory" in ran.words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("as_json", [False, True])
def test_explain_loads_nothing_and_writes_nothing(
    as_json: bool,
    run: Callable[..., Any],
    model: Path,
    requests: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were about to be loaded")

    monkeypatch.setattr("capstan.generation.engine.WeightStore", refuse)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    output, scratch = tmp_path / "answers.jsonl", tmp_path / "scratch"
    words = [
        "--model",
        model,
        "--input",
        requests,
        "--output",
        output,
        "--disk",
        scratch,
        *SMALL,
        "--explain",
    ]
    ran = run("generate", *words, *(["--json"] if as_json else []))
    assert ran.code == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert ran.err == ""
    if as_json:
        record = json.loads(ran.out)
        assert record["verb"] == "generate"
        assert record["trace"] is None
        assert record["plan"]["budget_bytes"]["device"] == 2 * 2**20
        assert [phase["counts"]["tokens"] for phase in record["plan"]["phases"]] == [4, 10]
    else:
        for words in ("4 sequences", "weights", "KV cache", "predicted peak", "2.00 MiB"):
            assert words in ran.out


def test_explain_of_a_file_without_requests_is_an_error(
    run: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n{}\n\n")
    ran = run("generate", "--model", model, "--input", empty, *SMALL, "--explain")
    assert ran.code == 1
    assert "bad line: line 2" in ran.err
    assert "empty.jsonl has no request that can be answered" in ran.words


@pytest.mark.parametrize("as_json", [False, True])
def test_a_file_of_bad_lines_only_is_answered_without_loading_the_model(
    as_json: bool, run: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    bad, output = tmp_path / "bad.jsonl", tmp_path / "answers.jsonl"
    bad.write_text("{}\n" * 7)
    words = ["generate", "--model", model, "--input", bad, "--output", output, *SMALL]
    ran = run(*words, *(["--json"] if as_json else []))
    assert ran.code == 0
    assert ran.err.count("bad line: line ") == 5
    assert "and 2 more; the output has a line for each." in ran.words
    statuses = [json.loads(line)["response"]["status_code"] for line in output.read_text().splitlines()]
    assert statuses == [400] * 7
    if as_json:
        record = json.loads(ran.out)
        assert (record["num_answered"], record["num_errors"], record["plan"]) == (0, 7, None)
    else:
        assert "0 answered, 7 bad lines." in ran.words


def test_a_run_prints_the_plan_then_what_was_measured(
    run: Callable[..., Any], model: Path, requests: Path, tmp_path: Path
) -> None:
    output = tmp_path / "sub" / "answers.jsonl"
    ran = run("generate", "--model", model, "--input", requests, "--output", output, *SMALL)
    assert ran.code == 0
    assert ran.out.index("predicted peak") < ran.out.index("measured peak")
    assert "answers.jsonl: 4 answered." in ran.words
    assert ran.err == ""


def test_json_is_the_only_thing_on_standard_output_and_progress_on_standard_error(
    run: Callable[..., Any], model: Path, requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capstan.cli.progress._PLAIN_EVERY_S", 0.0)
    output = tmp_path / "answers.jsonl"
    ran = run("generate", "--model", model, "--input", requests, "--output", output, *SMALL, "--json")
    assert ran.code == 0
    record = json.loads(ran.out)
    assert {"verb", "plan", "trace"} <= set(record)
    assert record["output"] == str(output)
    assert record["plan"]["bytes"] == record["trace"]["bytes"]
    assert "loading weights 100%" in ran.words
    assert "generating 100%" in ran.words
    assert "4 of 4 done" in ran.words


def test_progress_says_nothing_on_standard_output(
    run: Callable[..., Any], model: Path, requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capstan.cli.progress._PLAIN_EVERY_S", 0.0)
    output = tmp_path / "answers.jsonl"
    ran = run("generate", "--model", model, "--input", requests, "--output", output, *SMALL)
    assert "loading weights" in ran.err
    assert "tokens/s, sweep" in ran.err
    assert "loading weights" not in ran.out
    assert "sweep" not in ran.out


def test_max_tokens_is_for_lines_that_do_not_say(
    run: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    requests, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    requests.write_text('{"prompt": [1, 2]}\n{"prompt": [1, 2], "max_tokens": 3}\n')
    words = ["generate", "--model", model, "--input", requests, "--output", output, *SMALL]
    assert run(*words, "--max-tokens", 5).code == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    numbers = {line["custom_id"]: line["response"]["body"]["usage"]["completion_tokens"] for line in lines}
    assert numbers == {"line-1": 5, "line-2": 3}


def test_overwrite_starts_anew_where_another_job_would_be_refused(
    run: Callable[..., Any], model: Path, requests: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    words = ["generate", "--model", model, "--input", requests, "--output", output, *SMALL]
    assert run(*words).code == 0
    requests.write_text('{"prompt": [5], "max_tokens": 1}\n')
    before = output.read_bytes()
    refused = run(*words)
    assert refused.code == 1
    assert "belongs to a job with another input" in refused.words
    assert "--overwrite" in refused.err
    assert output.read_bytes() == before
    ran = run(*words, "--overwrite")
    assert ran.code == 0
    assert len(output.read_text().splitlines()) == 1
