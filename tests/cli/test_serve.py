"""`capstan serve`: what it refuses before it listens, and what --explain shows."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("small_machine")

SMALL = ["--device", "cpu", "--device-memory", "2MiB", "--host-memory", "1MiB", "--max-length", "32"]


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAPSTAN_TOKEN", raising=False)


def test_explain_shows_the_plan_for_the_slots_and_nothing_listens(
    run: Callable[..., Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", None)
    ran = run("serve", model, *SMALL, "--slots", "5", "--explain")
    assert ran.code == 0
    assert "tiny-llama" in ran.out
    assert "5 sequences" in ran.words
    ran = run("serve", model, *SMALL, "--slots", "5", "--explain", "--json")
    record = json.loads(ran.out)
    assert record["verb"] == "serve"
    assert record["trace"] is None
    assert record["plan"]["peak_bytes"]["device"] <= 2 << 20


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["--host", "0.0.0.0"], 2, "CAPSTAN_TOKEN"),
        (["--host", "no such host"], 2, "Whoever can reach"),
        (["--max-length", "65"], 2, "exceeds the model's context of 64"),
        (["--max-length", "3"], 2, "greater than or equal to 4"),
        (["--max-body", "much"], 2, "'much' is not a size"),
        (["--token-file", "no/such/file"], 1, "no/such/file"),
        (["--device-memory", "20KiB"], 1, "20.00 KiB"),
        (["--slots", "0"], 2, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_served_is_refused_in_words(
    words: list[str], code: int, named: str, run: Callable[..., Any], model: Path
) -> None:
    ran = run("serve", model, *SMALL, "--port", 0, *words)
    assert ran.code == code
    assert named in ran.words
    assert ran.out == ""


def test_a_token_file_must_hold_one(run: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(" \n")
    ran = run("serve", model, *SMALL, "--token-file", tmp_path / "token")
    assert ran.code == 1
    assert "is empty" in ran.words


def test_a_port_that_is_taken_is_named(run: Callable[..., Any], model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = run("serve", model, *SMALL, "--port", port)
    assert ran.code == 1
    assert f"127.0.0.1:{port} cannot be listened on" in ran.words


def test_a_folder_for_files_that_cannot_be_written_is_named(
    run: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    ran = run("serve", model, *SMALL, "--port", 0, "--files", tmp_path / "file")
    assert ran.code == 1
    assert "Name another --files" in ran.words
