"""The journal: what was written is kept, what was torn is written again, and jobs are not mixed."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capstan.errors import DoesNotFit, InputError
from capstan.generation.batch.journal import Journal

JOB = {"input": "digest", "model": "fingerprint", "weights": ["identity"], "cache": ["identity"]}


def line(name: str, **more: Any) -> dict[str, Any]:
    return {"custom_id": name, "text": "über\n\u2028 \x85", **more}


def write(output: Path, *names: str, job: dict[str, Any] = JOB, overwrite: bool = False) -> None:
    with Journal(output, job, overwrite=overwrite) as journal:
        journal.append([line(name) for name in names])


def answered(output: Path, job: dict[str, Any] = JOB) -> set[str]:
    with Journal(output, job) as journal:
        return journal.answered


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def test_a_job_goes_on_where_it_was(output: Path) -> None:
    assert answered(output) == set()
    write(output, "a", "b")
    assert answered(output) == {"a", "b"}
    write(output, "c")
    assert answered(output) == {"a", "b", "c"}
    assert [json.loads(each) for each in output.read_bytes().split(b"\n")[:-1]] == [
        line("a"),
        line("b"),
        line("c"),
    ]


def test_answers_are_on_disk_when_append_returns(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    real_write, real_sync = os.write, os.fsync

    def spy_write(file: int, data: bytes) -> int:
        calls.append(("write", file))
        return real_write(file, data)

    def spy_sync(file: int) -> None:
        calls.append(("sync", file))
        real_sync(file)

    with Journal(output, JOB) as journal:
        monkeypatch.setattr(os, "write", spy_write)
        monkeypatch.setattr(os, "fsync", spy_sync)
        journal.append([line("a"), line("b")])
        monkeypatch.undo()
        assert [name for name, _ in calls] == ["write", "sync"]
        assert len({file for _, file in calls}) == 1
        assert len(output.read_bytes().splitlines()) == 2


def test_a_write_that_the_system_cuts_into_pieces_is_whole(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write = os.write
    with Journal(output, JOB) as journal:
        monkeypatch.setattr(os, "write", lambda file, data: real_write(file, bytes(data)[:7]))
        journal.append([line("a"), line("b")])
        monkeypatch.undo()
    assert answered(output) == {"a", "b"}


def test_appending_nothing_writes_nothing(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise AssertionError("nothing was to be written")

    with Journal(output, JOB) as journal:
        monkeypatch.setattr(os, "write", refuse)
        journal.append([])
        monkeypatch.undo()
    assert output.read_bytes() == b""


@pytest.mark.parametrize("part", sorted(JOB))
def test_another_job_is_refused_and_told_what_differs(part: str, output: Path) -> None:
    write(output, "a")
    before = output.read_bytes()
    with pytest.raises(InputError, match=f"belongs to a job with another {part};.*--overwrite"):
        Journal(output, JOB | {part: "other"})
    assert output.read_bytes() == before
    assert answered(output) == {"a"}, "the refusal left no lock and changed nothing"


def test_all_that_differs_is_named(output: Path) -> None:
    write(output, "a")
    with pytest.raises(InputError, match="another input and weights;"):
        Journal(output, JOB | {"input": "other", "weights": "other"})


def test_overwrite_starts_anew(output: Path) -> None:
    write(output, "a", "b")
    other = JOB | {"input": "other"}
    write(output, "c", job=other, overwrite=True)
    assert answered(output, other) == {"c"}
    with pytest.raises(InputError, match="another input"):
        Journal(output, JOB)


def test_a_file_of_something_else_is_not_touched_unless_told_to(output: Path) -> None:
    output.write_text("my thesis\n")
    with pytest.raises(InputError, match=r"was not written by a batch job.*--overwrite"):
        Journal(output, JOB)
    # Nor is it at the second try, now that the lock file is there.
    with pytest.raises(InputError, match="was not written by a batch job"):
        Journal(output, JOB)
    assert output.read_text() == "my thesis\n"
    write(output, "a", overwrite=True)
    assert answered(output) == {"a"}


def test_an_empty_file_of_something_else_may_be_used(output: Path) -> None:
    output.touch()
    write(output, "a")
    assert answered(output) == {"a"}


@pytest.mark.parametrize("text", ['{"format": "capst', "[]", '{"format": "other"}', "\x00\x00"])
def test_a_damaged_job_file_is_refused_unless_told_to_overwrite(text: str, output: Path) -> None:
    write(output, "a")
    job_file = output.with_name("answers.jsonl.job")
    job_file.write_text(text)
    with pytest.raises(InputError, match=r"answers\.jsonl\.job is damaged.*--overwrite"):
        Journal(output, JOB)
    assert b'"a"' in output.read_bytes()
    write(output, "b", overwrite=True)
    assert answered(output) == {"b"}


@pytest.mark.parametrize("bad", ["what?", '{"custom": "b"}', "[1]", "", '{"custom_id": "b"', "7"])
def test_a_line_that_was_changed_by_hand_is_named(bad: str, output: Path) -> None:
    write(output, "a", "b", "c")
    lines = output.read_text().split("\n")
    lines[1] = bad
    output.write_text("\n".join(lines))
    before = output.read_bytes()
    with pytest.raises(InputError, match=r"answers\.jsonl, line 2, is not an answer.*--overwrite"):
        Journal(output, JOB)
    assert output.read_bytes() == before


def test_an_output_that_was_removed_is_written_again(output: Path) -> None:
    write(output, "a")
    output.unlink()
    assert answered(output) == set()


def test_a_folder_that_is_not_there_is_made(tmp_path: Path) -> None:
    write(tmp_path / "some" / "where" / "answers.jsonl", "a")
    assert answered(tmp_path / "some" / "where" / "answers.jsonl") == {"a"}


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written.*another --output"):
        Journal(tmp_path / "file" / "answers.jsonl", JOB)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_no_output(overwrite: bool, tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    folder.mkdir()
    with pytest.raises(InputError, match=r"answers is a folder\..*--output"):
        Journal(folder, JOB, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["answers"]


# --- the disk ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [0, 10, 70])
def test_a_full_disk_says_run_again_and_nothing_is_lost_or_doubled(
    written: int, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = written
    real_write = os.write

    def until_full(file: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = real_write(file, bytes(data)[:room])
        room -= done
        return done

    write(output, "a")
    with Journal(output, JOB) as journal:
        monkeypatch.setattr(os, "write", until_full)
        with pytest.raises(DoesNotFit, match=r"No space left on device.*run the same command again"):
            journal.append([line("b"), line("c")])
        monkeypatch.undo()
    assert output.stat().st_size > written
    before = answered(output)
    assert before in ({"a"}, {"a", "b"})
    write(output, *sorted({"b", "c"} - before))
    assert answered(output) == {"a", "b", "c"}
    assert len(output.read_bytes().splitlines()) == 3


def test_a_disk_that_fails_to_sync_is_told(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Journal(output, JOB) as journal:
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(DoesNotFit, match="Input/output error"):
            journal.append([line("a")])
        monkeypatch.undo()


# --- two processes ----------------------------------------------------------------------------------------


_HOLD_LOCK = """
import fcntl, sys
with open(sys.argv[1]) as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(output: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Another process that is at the same output, in which "a" is answered."""
    write(output, "a")
    command = [sys.executable, "-c", _HOLD_LOCK, f"{output}.job"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_another_process_writes_is_refused(
    overwrite: bool, output: Path, holder: "subprocess.Popen[bytes]"
) -> None:
    before = output.read_bytes()
    with pytest.raises(InputError, match=r"Another process is writing .*answers\.jsonl"):
        Journal(output, JOB, overwrite=overwrite)
    assert output.read_bytes() == before


def test_the_lock_of_a_process_that_was_killed_is_gone(
    output: Path, holder: "subprocess.Popen[bytes]"
) -> None:
    holder.kill()
    holder.wait()
    assert answered(output) == {"a"}


def test_a_journal_locks_its_output_until_it_is_closed(output: Path) -> None:
    with Journal(output, JOB) as journal:
        journal.append([line("a")])
        with pytest.raises(InputError, match="Another process"):
            Journal(output, JOB)
        journal.append([line("b")])
    assert answered(output) == {"a", "b"}


# --- any moment -------------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5)
folder_is_reused = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@folder_is_reused
@given(all_names=st.lists(names, unique=True, max_size=8), data=st.data())
def test_cut_at_any_byte_nothing_is_answered_twice_or_lost(
    all_names: list[str], data: st.DataObject, output: Path
) -> None:
    size = data.draw(st.integers(1, 3), label="answers in a write")
    parts = [all_names[start : start + size] for start in range(0, len(all_names), size)]
    with Journal(output, JOB, overwrite=True) as journal:
        for part in parts:
            journal.append([line(name) for name in part])
    whole = output.read_bytes()
    for _ in range(3):
        now = output.read_bytes()
        cut = data.draw(st.integers(0, len(now)), label="cut at byte")
        os.truncate(output, cut)
        with Journal(output, JOB) as journal:
            kept = output.read_bytes()
            assert kept == now[: now.rfind(b"\n", 0, cut) + 1], "whole lines are kept, a part of one is not"
            assert journal.answered == {json.loads(each)["custom_id"] for each in kept.split(b"\n")[:-1]}
            journal.append([line(name) for name in all_names if name not in journal.answered])
        assert sorted(output.read_bytes().split(b"\n")) == sorted(whole.split(b"\n"))


@folder_is_reused
@given(name=names)
def test_any_name_is_found_again(name: str, output: Path) -> None:
    write(output, name, overwrite=True)
    assert answered(output) == {name}


def test_a_name_with_half_a_surrogate_pair_is_found_again(output: Path) -> None:
    write(output, json.loads('"\\ud83d"'))
    assert answered(output) == {"\ud83d"}


def test_signs_at_which_other_programs_end_a_line_are_escaped(tmp_path: Path) -> None:
    name = "a\u2028b\u2029c\x85d\u00e9"
    with Journal(tmp_path / "out.jsonl", {"input": "x"}) as journal:
        journal.append([{"custom_id": name}])
    text = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 1
    assert json.loads(text) == {"custom_id": name}
    assert "\u00e9" in text
