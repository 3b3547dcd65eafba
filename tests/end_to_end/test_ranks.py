"""`capstan generate` as torchrun starts it: a process for each rank, one output; one of them may die."""

import json
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from capstan.cli import main
from world import Forked

# A rank that waits for a dead one is told by the closed connection, at once; the rest is a busy machine's.
PATIENCE_S = 60


@pytest.fixture
def start_ranks(
    fork: Callable[..., Forked],
    torchrun: Callable[[int], list[dict[str, str]]],
    environment: Mapping[str, str],
) -> Callable[..., list[Forked]]:
    """`start_ranks("generate", …)`: two ranks, with the variables that torchrun sets."""

    def start_ranks(*words: str) -> list[Forked]:
        return [
            fork("commands.py", "capstan", *words, environment={**environment, **each})
            for each in torchrun(2)
        ]

    return start_ranks


def _wait_for_lines(output: Path, count: int) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not output.exists() or len(output.read_text().splitlines()) < count:
        assert time.monotonic() < until_s, "no answer was written"
        time.sleep(0.01)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_when_a_rank_dies_the_others_end_naming_it_and_the_same_command_goes_on(
    model: Path,
    environment: Mapping[str, str],
    monkeypatch: pytest.MonkeyPatch,
    start_ranks: Callable[..., list[Forked]],
    write_requests: Callable[..., None],
    read_lines: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
    victim: int,
) -> None:
    requests, output, alone = (tmp_path / name for name in ("requests.jsonl", "out.jsonl", "alone.jsonl"))
    write_requests(requests, 40, lambda index: 20 + (11 * index) % 81)
    command = ["generate", "--model", str(model), "--input", str(requests), "--device", "cpu"]
    command += ["--device-memory", "4MiB", "--host-memory", "2MiB", "--place", "cache=host weights=host"]
    ranks = start_ranks(*command, "--output", str(output))
    _wait_for_lines(output, 3)
    ranks[victim].send_signal(signal.SIGKILL)
    survivor = ranks[1 - victim]
    _, errors = survivor.communicate(timeout=PATIENCE_S)
    assert survivor.returncode == 1
    assert f"Rank {victim} is gone, of 2" in errors
    assert 3 <= len(output.read_text().splitlines()) < 40

    first, second = start_ranks(*command, "--output", str(output), "--json")
    told, errors = first.communicate(timeout=PATIENCE_S)
    assert first.returncode == 0, errors
    assert "are answered already; going on with the rest" in errors
    assert second.communicate(timeout=PATIENCE_S) == ("", "")
    assert second.returncode == 0
    accounts = json.loads(told)["ranks"]
    for account in accounts:
        assert account["trace"]["bytes"] == account["plan"]["bytes"]
    assert accounts[0]["plan"]["bytes"]["rank 0->rank 1"] == accounts[1]["plan"]["bytes"]["rank0->rank1"]

    monkeypatch.setenv("CAPSTAN_CACHE", environment["CAPSTAN_CACHE"])
    assert main([*command, "--output", str(alone)]) == 0
    answers = {line["custom_id"]: line for line in read_lines(output)}
    assert len(read_lines(output)) == len(answers) == 40
    assert answers == {line["custom_id"]: line for line in read_lines(alone)}
