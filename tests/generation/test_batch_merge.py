"""Merging outputs: all or nothing, and what is wrong is named by file and line."""

import hashlib
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capstan.errors import DoesNotFit, InputError, UsageError
from capstan.generation.batch.journal import Journal
from capstan.generation.batch.merge import merge

IDS = ("a", "b", "c", "d", "e")


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    """Five lines with ids, and one that is empty after the second."""
    path = tmp_path / "in.jsonl"
    lines = [json.dumps({"custom_id": name, "prompt": "x"}) + "\n" for name in IDS]
    path.write_text("".join([*lines[:2], "\n", *lines[2:]]))
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "all.jsonl"


@pytest.fixture
def job(batch: Path) -> dict[str, Any]:
    """What is known beside an output."""
    digest = hashlib.sha256(batch.read_bytes()).hexdigest()
    return {"input": digest, "--shard": None, "--max-tokens": 3, "model": "fingerprint", "weights": ["plain"]}


@pytest.fixture
def write(tmp_path: Path, job: dict[str, Any]) -> Callable[..., Path]:
    """`write("out-1.jsonl", "ace", shard="1/2")`: an output with these answers."""

    def write(name: str, ids: str, *, shard: str | None = None, **changes: Any) -> Path:
        output = tmp_path / name
        with Journal(output, job | {"--shard": shard} | changes) as journal:
            journal.append([{"custom_id": each, "text": f"über {each}", "error": None} for each in ids])
        return output

    return write


@pytest.fixture
def halves(write: Callable[..., Path]) -> list[Path]:
    """The outputs of two shards that are finished."""
    return [write("out-1.jsonl", "eca", shard="1/2"), write("out-2.jsonl", "bd", shard="2/2")]


def refused(outputs: list[Path], batch: Path, target: Path) -> list[str]:
    """What is told of a merge that cannot be done, line by line and without folders."""
    before = sorted(batch.parent.iterdir())
    with pytest.raises(InputError) as raised:
        merge(outputs, batch, target)
    assert sorted(batch.parent.iterdir()) == before, "nothing was written"
    head, *troubles = str(raised.value).replace(f"{batch.parent}/", "").split("\n")
    assert head == "all.jsonl was not written:"
    return [trouble.strip() for trouble in troubles]


def test_answers_stand_in_the_order_of_the_batch_file_byte_for_byte(
    halves: list[Path], batch: Path, target: Path
) -> None:
    report = merge(halves, batch, target)
    first, second = (output.read_bytes().splitlines(keepends=True) for output in halves)
    assert target.read_bytes() == b"".join([first[2], second[0], first[1], second[1], first[0]])
    assert (report.num_answered, report.num_errors) == (5, 0)
    assert report.size_bytes == target.stat().st_size
    assert not [path for path in target.parent.iterdir() if path.name.startswith(".")]


def test_outputs_without_anything_beside_them_are_merged(
    halves: list[Path], batch: Path, target: Path
) -> None:
    for output in halves:
        output.with_name(output.name + ".job").unlink()
    assert merge(halves, batch, target).num_answered == 5


def test_an_empty_batch_file_is_merged_to_an_empty_file(
    write: Callable[..., Path], batch: Path, target: Path
) -> None:
    batch.write_text("\n \n")
    output = write("out-1.jsonl", "", input=hashlib.sha256(batch.read_bytes()).hexdigest())
    assert merge([output], batch, target).size_bytes == 0
    assert target.read_bytes() == b""


def test_answers_are_not_kept_in_memory(tmp_path: Path, batch: Path, target: Path) -> None:
    output, answer_bytes, num_lines = tmp_path / "out.jsonl", 1 << 20, 24
    batch.write_text('{"prompt": "x"}\n' * num_lines)
    with output.open("w") as file:
        for number in range(num_lines, 0, -1):
            text = "x" * answer_bytes
            file.write(json.dumps({"custom_id": f"line-{number}", "text": text, "error": None}) + "\n")
    tracemalloc.start()
    try:
        merge([output], batch, target)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert target.stat().st_size > num_lines * answer_bytes
    # A line in bytes, as it is read in pieces, in text, and as it is parsed; and the line before it.
    assert peak_bytes < 6 * answer_bytes


# --- what is wrong ----------------------------------------------------------------------------------------


def test_an_output_that_is_not_finished_is_named_with_its_shard(
    write: Callable[..., Path], batch: Path, target: Path
) -> None:
    outputs = [write("out-1.jsonl", "ea", shard="1/2"), write("out-2.jsonl", "bd", shard="2/2")]
    assert refused(outputs, batch, target) == [
        "in.jsonl, line 4, custom_id 'c', is not answered: out-1.jsonl is not finished (shard 1/2). "
        "Run its command again."
    ]


def test_lines_of_a_shard_that_was_not_given_are_named(halves: list[Path], batch: Path, target: Path) -> None:
    assert refused(halves[:1], batch, target) == [
        f"in.jsonl, line {number}, custom_id {name!r}, is not answered: none of the outputs has it. "
        "Is a shard missing?"
        for number, name in ((2, "b"), (5, "d"))
    ]


def test_double_answers_are_named_with_both_places(
    halves: list[Path], write: Callable[..., Path], batch: Path, target: Path
) -> None:
    more = write("more.jsonl", "ca", shard="1/2")
    assert refused([*halves, more], batch, target) == [
        "more.jsonl, line 1, answers custom_id 'c', and so does out-1.jsonl, line 2.",
        "more.jsonl, line 2, answers custom_id 'a', and so does out-1.jsonl, line 3.",
    ]


def test_an_output_that_is_given_twice_is_told(halves: list[Path], batch: Path, target: Path) -> None:
    troubles = refused([*halves, halves[1]], batch, target)
    assert troubles[0] == "out-2.jsonl, line 1, answers custom_id 'b', and so does out-2.jsonl, line 1."


def test_foreign_answers_are_named(write: Callable[..., Path], batch: Path, target: Path) -> None:
    assert refused([write("out.jsonl", "abxcde")], batch, target) == [
        "out.jsonl, line 3, answers custom_id 'x', which in.jsonl does not have."
    ]


def test_a_torn_line_is_named_and_is_no_answer(halves: list[Path], batch: Path, target: Path) -> None:
    os.truncate(halves[1], halves[1].stat().st_size - 1)
    assert refused(halves, batch, target) == [
        "out-2.jsonl, line 2, is torn: its job was stopped while it wrote. Run that job's command again.",
        "in.jsonl, line 5, custom_id 'd', is not answered: out-2.jsonl is not finished (shard 2/2). "
        "Run its command again.",
    ]


@pytest.mark.parametrize(
    "bad", ["what?", "[1]", "7", "", '{"custom_id": "d"}', '{"custom_id": ["d"], "error": 0}']
)
def test_a_line_that_is_no_answer_is_named(
    bad: str, write: Callable[..., Path], batch: Path, target: Path
) -> None:
    output = write("out.jsonl", "abcde")
    lines = output.read_text().splitlines()
    lines[3] = bad
    output.write_text("\n".join(lines) + "\n")
    assert (
        refused([output], batch, target)[0] == "out.jsonl, line 4, is not an answer that a batch job wrote."
    )


def test_the_answers_of_another_file_are_refused_though_the_ids_are_the_same(
    halves: list[Path], batch: Path, target: Path
) -> None:
    batch.write_text(batch.read_text().replace('"x"', '"y"'))
    assert refused(halves, batch, target) == [
        f"out-{index}.jsonl answers another file than in.jsonl, as out-{index}.jsonl.job says."
        for index in (1, 2)
    ]


def test_answers_of_two_kinds_are_not_mixed(
    halves: list[Path], write: Callable[..., Path], batch: Path, target: Path
) -> None:
    other = write("other.jsonl", "bd", shard="2/2", weights=["groups"], **{"--max-tokens": 4})
    assert refused([halves[0], other], batch, target) == [
        "other.jsonl is of a job with another --max-tokens (3, not 4) and weights than out-1.jsonl."
    ]


@pytest.mark.parametrize("text", ["{", '{"format": "capstan.batch-job", "--shard": "three"}'])
def test_what_is_damaged_beside_an_output_is_told(
    text: str, halves: list[Path], batch: Path, target: Path
) -> None:
    halves[0].with_name("out-1.jsonl.job").write_text(text)
    (trouble,) = refused(halves, batch, target)
    assert "out-1.jsonl.job is damaged" in trouble or "'three'" in trouble


def test_an_output_that_is_not_there_is_named(halves: list[Path], batch: Path, target: Path) -> None:
    halves[1].unlink()
    assert refused(halves, batch, target)[0] == "out-2.jsonl cannot be read: No such file or directory."


def test_of_many_troubles_the_first_are_told_and_the_others_counted(
    write: Callable[..., Path], batch: Path, target: Path
) -> None:
    troubles = refused([write("out.jsonl", "abcdefghijklmnopqrstu")], batch, target)
    assert len(troubles) == 11
    assert troubles[-1] == "… and 6 more."


# --- where it goes ----------------------------------------------------------------------------------------


def test_a_target_that_exists_is_replaced_only_when_told_to(
    halves: list[Path], batch: Path, target: Path
) -> None:
    target.write_text("my thesis\n")
    with pytest.raises(InputError, match=r"all\.jsonl exists\..*--overwrite"):
        merge(halves, batch, target)
    assert target.read_text() == "my thesis\n"
    merge(halves, batch, target, overwrite=True)
    assert len(target.read_bytes().splitlines()) == 5


def test_no_file_that_is_read_is_overwritten(halves: list[Path], batch: Path) -> None:
    before = [path.read_bytes() for path in (*halves, batch)]
    for path in (*halves, batch, batch.parent / "." / "in.jsonl"):
        with pytest.raises(UsageError, match="is one of the files to merge"):
            merge(halves, batch, path, overwrite=True)
    assert [path.read_bytes() for path in (*halves, batch)] == before


def test_a_folder_or_the_output_of_a_job_is_no_target(
    halves: list[Path], write: Callable[..., Path], batch: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is a folder"):
        merge(halves, batch, tmp_path, overwrite=True)
    with pytest.raises(InputError, match="is the output of a batch job"):
        merge(halves, batch, write("other.jsonl", "a"), overwrite=True)


def test_a_full_disk_leaves_what_was_there_before(
    halves: list[Path], batch: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    target.write_text("before\n")
    files = sorted(target.parent.iterdir())
    monkeypatch.setattr("capstan.storage.atomic.os.fsync", full)
    with pytest.raises(DoesNotFit, match="No space left on device"):
        merge(halves, batch, target, overwrite=True)
    assert target.read_text() == "before\n"
    assert sorted(target.parent.iterdir()) == files
