"""Shards: every line in exactly one, and merged they are what one machine would have written."""

import json
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capstan.generation.batch.answers import error_line
from capstan.generation.batch.ids import line_names, text_lines
from capstan.generation.batch.journal import Journal
from capstan.generation.batch.lines import BadLine, BatchRequest, parse_lines
from capstan.generation.batch.merge import merge
from capstan.generation.batch.shard import WHOLE, Shard

MODEL: Any = SimpleNamespace(
    folder=Path("models/tiny"),
    tokenizer=None,
    meta_model=SimpleNamespace(vocabulary_size=9, max_positions=64),
)
ids = st.sampled_from(("a", "b", "line-1", "line-2", "line-3", "line-3-again", "\ud83d", "…"))
good = st.builds(
    lambda stated, prompt: json.dumps({"prompt": prompt} | stated),
    st.fixed_dictionaries({}, optional={"custom_id": ids}),
    st.lists(st.integers(0, 9), max_size=3),
)
bad = st.sampled_from(("{", "[]", '{"custom_id": 5}', '{"custom_id": "a", "prompt": 7}'))
empty = st.sampled_from(("", " ", "\t\r"))
files = st.builds(
    lambda mark, lines, end: mark + "\n".join(lines) + end,
    st.sampled_from(("", "\ufeff")),
    st.lists(good | bad | empty, max_size=24),
    st.sampled_from(("", "\n")),
)


def parsed(path: Path, shard: Shard = WHOLE) -> list[BatchRequest | BadLine]:
    return parse_lines(text_lines(path), MODEL, max_tokens=4, shard=shard, taken=line_names(text_lines(path)))


def answer(outcome: BatchRequest | BadLine) -> dict[str, Any]:
    """A line that depends on all of the request."""
    if isinstance(outcome, BadLine):
        return error_line(outcome)
    return {"custom_id": outcome.custom_id, "response": repr(outcome.request), "error": None}


folder_is_reused = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@folder_is_reused
@given(text=files, count=st.integers(1, 30))
def test_every_line_good_or_bad_lies_in_exactly_one_shard(text: str, count: int, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(text.encode())
    whole = parsed(path)
    shares = [parsed(path, Shard(index, count)) for index in range(1, count + 1)]
    assert [share for share in shares if share] == [
        whole[at::count] for at in range(min(count, len(whole)))
    ], "each line is what it is in the whole file, and stands in its order"
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for one, other in combinations(shares, 2):
        assert not {line.custom_id for line in one} & {line.custom_id for line in other}


@given(lengths=st.lists(st.integers(1, 1000), min_size=1).map(sorted), count=st.integers(1, 12))
def test_shards_of_a_sorted_file_differ_by_at_most_the_longest_line(lengths: list[int], count: int) -> None:
    sums = [
        sum(length for at, length in enumerate(lengths, start=1) if Shard(index, count).holds(at))
        for index in range(1, count + 1)
    ]
    # Dealt in rising order, the last share's k-th line is no longer than any share's next one.
    assert max(sums) - min(sums) <= lengths[-1]


@folder_is_reused
@given(text=files, count=st.integers(1, 6), chance=st.randoms(use_true_random=False))
def test_merged_shards_are_what_one_machine_would_have_answered_in_batch_order(
    text: str, count: int, chance: Any, tmp_path: Path
) -> None:
    path, merged, alone = (tmp_path / name for name in ("requests.jsonl", "merged.jsonl", "alone.jsonl"))
    path.write_bytes(text.encode())
    outputs = []
    for index in range(1, count + 1):
        outputs.append(tmp_path / f"out-{index}.jsonl")
        lines = [answer(outcome) for outcome in parsed(path, Shard(index, count))]
        chance.shuffle(lines)
        write(outputs[-1], lines)
    chance.shuffle(outputs)
    report = merge(outputs, path, merged, overwrite=True)
    whole = [answer(outcome) for outcome in parsed(path)]
    write(alone, whole)
    assert merged.read_bytes() == alone.read_bytes()
    assert report.num_errors == sum(line["error"] is not None for line in whole)
    assert report.num_answered + report.num_errors == len(whole)
    assert report.size_bytes == merged.stat().st_size


def write(output: Path, lines: list[dict[str, Any]]) -> None:
    """As a job does; nothing beside it says which."""
    with Journal(output, {}, overwrite=True) as journal:
        journal.append(lines)
    output.with_name(output.name + ".job").unlink()
