"""C is compiled once and kept; where that cannot be, callers are told so and go another way."""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from capstan.hardware import compiler
from capstan.hardware.compiler import compiled

pytestmark = pytest.mark.skipif(compiler._compiler() is None, reason="there is no C compiler")

SOURCE = "int answer(void) { return ANSWER; }\n"


@pytest.fixture
def source(tmp_path: Path, cache: Path) -> Path:
    """A C file, beside a cache folder that does not exist yet."""
    file = tmp_path / "answers.c"
    file.write_text(SOURCE)
    return file


@pytest.fixture
def forget() -> Iterator[Callable[[], None]]:
    """`forget()`: as in a new process."""
    yield compiler._compiled.cache_clear
    compiler._compiled.cache_clear()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every command that was run."""
    seen: list[list[str]] = []
    run = subprocess.run

    def watched(command: list[str], **options: Any) -> Any:
        seen.append(command)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", watched)
    return seen


def _files(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "compiled").iterdir())


def test_a_file_is_compiled_once_and_kept(
    source: Path, cache: Path, forget: Callable[[], None], runs: list[list[str]]
) -> None:
    first = compiled(source, {"ANSWER": 42})
    assert first is not None
    assert first.answer() == 42
    assert compiled(source, {"ANSWER": 42}) is first
    forget()
    again = compiled(source, {"ANSWER": 42})
    assert again is not None
    assert again.answer() == 42
    assert len(runs) == 1
    assert len(_files(cache)) == 1, "the compiler's own output was renamed, not copied"


def test_other_macros_and_another_source_are_compiled_apart(
    source: Path, cache: Path, forget: Callable[[], None], runs: list[list[str]]
) -> None:
    libraries = [compiled(source, {"ANSWER": number}) for number in (1, 2)]
    source.write_text(SOURCE.replace("ANSWER", "ANSWER + 10"))
    forget()
    libraries.append(compiled(source, {"ANSWER": 1}))
    assert [library.answer() for library in libraries if library is not None] == [1, 2, 11]
    assert len(runs) == len(_files(cache)) == 3


@pytest.mark.usefixtures("forget")
def test_a_file_that_does_not_compile_is_told_with_the_compilers_words_and_leaves_nothing(
    source: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source.write_text("int answer(void) { return forty_two; }\n")
    with caplog.at_level(logging.WARNING):
        assert compiled(source, {}) is None
    assert "answers.c could not be compiled and is not used" in caplog.text
    assert "forty_two" in caplog.text
    assert _files(cache) == []


@pytest.mark.usefixtures("forget")
def test_a_compiler_that_does_not_end_is_given_up(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow = source.with_name("slow-compiler")
    slow.write_text("#!/bin/sh\nexec sleep 600\n")
    slow.chmod(0o755)
    monkeypatch.setenv("CC", str(slow))
    monkeypatch.setattr(compiler, "_PATIENCE_S", 0.05)
    assert compiled(source, {"ANSWER": 1}) is None
    assert "timed out" in caplog.text
    assert _files(cache) == []


@pytest.mark.usefixtures("forget")
def test_without_a_compiler_nothing_is_compiled(
    source: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.INFO):
        assert compiled(source, {"ANSWER": 1}) is None
    assert "No C compiler was found" in caplog.text
    assert not cache.exists()


def test_a_cache_folder_that_cannot_be_written_is_told(
    source: Path,
    cache: Path,
    forget: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CAPSTAN_CACHE", str(source))  # a file: not even root makes a folder in it
    assert compiled(source, {"ANSWER": 1}) is None
    assert "answers.c could not be compiled and is not used" in caplog.text
    monkeypatch.setenv("CAPSTAN_CACHE", str(cache))
    forget()
    assert compiled(source, {"ANSWER": 1}) is not None


@pytest.mark.usefixtures("forget")
def test_a_kept_library_that_is_damaged_is_made_again(source: Path, cache: Path) -> None:
    script = "import sys; from pathlib import Path; from capstan.hardware.compiler import compiled\n"
    script += "assert compiled(Path(sys.argv[1]), {'ANSWER': 3}).answer() == 3"
    subprocess.run([sys.executable, "-c", script, str(source)], check=True)
    (library,) = (cache / "compiled").iterdir()
    library.write_bytes(b"not a library")
    again = compiled(source, {"ANSWER": 3})
    assert again is not None
    assert again.answer() == 3


def test_processes_that_compile_the_same_file_at_once_all_get_it(source: Path, cache: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from capstan.hardware.compiler import compiled\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "library = compiled(Path(sys.argv[1]), {'ANSWER': 7})\n"
        "sys.exit(library is None or library.answer() != 7)\n"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(source)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        child.communicate()
    assert [child.returncode for child in children] == [0, 0, 0]
    assert len(_files(cache)) == 1
