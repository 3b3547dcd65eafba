"""`capstan generate --shard` and `capstan merge`: shares of a file, and one file out of them again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("small_machine")

SMALL = ["--device", "cpu", "--device-memory", "2MiB", "--host-memory", "1MiB"]


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    """Requests that become longer, with bad lines, an empty one and an id that is used twice."""
    path = tmp_path / "in.jsonl"
    lines = [json.dumps({"prompt": [1 + at, 2, 3] * (1 + at), "max_tokens": 2 + at % 3}) for at in range(7)]
    lines[1] = json.dumps({"custom_id": "line-2", **json.loads(lines[1])})
    twice = '{"custom_id": "line-2", "prompt": [4]}'
    path.write_text("\ufeff" + "\n".join([*lines[:3], "", "what?", *lines[3:], twice, "{}"]) + "\n")
    return path


@pytest.fixture
def generate(run: Callable[..., Any], model: Path, batch: Path) -> Callable[..., Any]:
    """`generate(output, …)`: the batch file's answers, or a share of them."""

    def generate(output: Path, *words: object) -> Any:
        return run("generate", "--model", model, "--input", batch, "--output", output, *SMALL, *words)

    return generate


def test_merged_shards_are_the_file_that_one_machine_writes(
    generate: Callable[..., Any], run: Callable[..., Any], batch: Path, tmp_path: Path
) -> None:
    assert generate(tmp_path / "alone.jsonl").code == 0
    sorted_alone, merged = tmp_path / "sorted.jsonl", tmp_path / "all.jsonl"
    assert run("merge", tmp_path / "alone.jsonl", "--input", batch, "--output", sorted_alone).code == 0
    outputs = [tmp_path / f"out-{index}.jsonl" for index in (1, 2, 3)]
    numbers = []
    for index, output in enumerate(outputs, start=1):
        ran = generate(output, "--shard", f"{index}/3", "--json")
        assert ran.code == 0
        record = json.loads(ran.out)
        assert record["shard"] == f"{index}/3"
        numbers.append((record["num_answered"], record["num_errors"]))
        assert ran.err.count("bad line: ") == record["num_errors"], "a share tells of its own bad lines"
    assert numbers == [(2, 2), (3, 0), (2, 1)]

    ran = run("merge", *reversed(outputs), "--input", batch, "--output", merged, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out) == {
        "verb": "merge",
        "output": str(merged),
        "num_outputs": 3,
        "num_answered": 7,
        "num_errors": 3,
        "size_bytes": merged.stat().st_size,
    }
    assert merged.read_bytes() == sorted_alone.read_bytes()
    names = [json.loads(line)["custom_id"] for line in merged.read_text().splitlines()]
    assert names == [f"line-{number}" for number in (1, 2, 3, 5, 6, 7, 8, 9, 10, 11)]


def test_a_shard_goes_on_where_it_was_and_another_is_refused(
    generate: Callable[..., Any], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    assert generate(output, "--shard", "1/3").code == 0
    whole = output.read_bytes()
    output.write_bytes(whole[: whole.index(b"\n") + 10])
    refused = generate(output, "--shard", "2/3")
    assert refused.code == 1
    assert (
        "belongs to a job with another --shard (1/3, not 2/3); going on would mix two jobs" in refused.words
    )
    ran = generate(output, "--shard", "1/3")
    assert ran.code == 0
    assert "1 requests are answered already" in ran.words
    assert sorted(output.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_merge_says_what_was_wrong_and_writes_nothing(
    generate: Callable[..., Any], run: Callable[..., Any], batch: Path, tmp_path: Path
) -> None:
    output, merged = tmp_path / "out-1.jsonl", tmp_path / "all.jsonl"
    assert generate(output, "--shard", "1/4").code == 0
    ran = run("merge", output, "--input", batch, "--output", merged, "--json")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(
        f"error: {merged} was not written:\n  {batch}, line 2, custom_id 'line-2', is not"
    )
    assert not merged.exists()


def test_a_merge_tells_how_much_it_wrote(
    generate: Callable[..., Any], run: Callable[..., Any], batch: Path, tmp_path: Path
) -> None:
    output, merged = tmp_path / "out.jsonl", tmp_path / "all.jsonl"
    assert generate(output, "--shard", "1/1").code == 0
    ran = run("merge", output, "--input", batch, "--output", merged)
    assert (ran.code, ran.out) == (0, f"{merged}: 7 answered, 3 bad lines, from 1 file.\n")


@pytest.mark.parametrize(
    "shard", ["0/8", "9/8", "x", "2", "/8", "2/", "-1/8", "2/0", "1.0/2", " 1/2", "1/2/3", ""]
)
def test_a_shard_that_cannot_be_is_wrong_usage(
    shard: str, generate: Callable[..., Any], tmp_path: Path
) -> None:
    ran = generate(tmp_path / "out.jsonl", "--shard", shard)
    assert ran.code == 2
    assert "--shard takes I/N, the I-th of N shares with I from 1 to N, as in 2/8" in ran.words
    assert repr(shard) in ran.err
    assert ran.out == ""


def test_explain_plans_the_share(run: Callable[..., Any], model: Path, batch: Path, tmp_path: Path) -> None:
    words = ["generate", "--model", model, "--input", batch, *SMALL, "--explain", "--shard"]
    assert "3 sequences" in run(*words, "2/3").out
    ran = run(*words, "11/12")
    assert ran.code == 1
    assert f"Shard 11/12 of {batch} has no request that can be answered" in ran.words


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--input", "x", "--output", "y"], "OUTPUT"),
        (["out.jsonl", "--output", "y"], "--input"),
        (["out.jsonl", "--input", "x"], "--output"),
        (["y", "--input", "x", "--output", "y"], "is one of the files to merge"),
    ],
)
def test_a_wrong_merge_is_wrong_usage(words: list[str], named: str, run: Callable[..., Any]) -> None:
    ran = run("merge", *words)
    assert ran.code == 2
    assert named in ran.words
    assert ran.out == ""
