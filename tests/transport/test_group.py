"""Ranks tell each other values and tensors; a wait for one that is gone or silent ends, and names it."""

import json
import os
import socket
import subprocess
import sys
from typing import Any

import pytest

from capstan.transport.group import join

# When all have heard from all, the others go away or fall silent while rank 0 waits for rank 1.
_RANK = """
import json, os, sys, time
import torch
from capstan.errors import CapstanError
from capstan.transport.group import join

torch.set_num_threads(1)
group = join("cpu", patience_s=2.0)
assert join("cpu", patience_s=2.0) is group
told = {"gathered": group.gather({"rank": group.rank}), "shared": group.share([group.rank, "first"])}
following = (group.rank + 1) % group.size
before = (group.rank - 1) % group.size
arrived = [torch.empty(2, dtype=torch.bfloat16) for _ in range(2)]
receiving = [group.receive(each, before) for each in arrived]
values = [torch.full((2,), group.rank + at / 2, dtype=torch.bfloat16) for at in (0, 1)]
sending = [group.send(each, following) for each in values]
for transfer in (*receiving, *sending):
    transfer.wait()
told["arrived"] = [each.tolist() for each in arrived]
group.gather(None)
if group.rank == 0:
    started_s = time.monotonic()
    try:
        group.receive(torch.empty(1), 1).wait()
    except CapstanError as error:
        told["error"] = f"{type(error).__name__}: {error}"
    told["waited_s"] = time.monotonic() - started_s
elif sys.argv[1] == "silent":
    time.sleep(3)
print(json.dumps(told), flush=True)
os._exit(0)
"""


def _world(size: int, fate: str) -> list[dict[str, Any]]:
    """What so many ranks found, all but the first of which are "gone" or "silent" in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, fate],
            env=world | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [process.communicate(timeout=60) for process in ranks]
    for process, (_, errors) in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output) for output, _ in outputs]


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    """What three ranks found, two of which went away."""
    return _world(3, "gone")


def test_every_rank_has_what_all_gave_and_what_the_first_shares(told: list[dict[str, Any]]) -> None:
    for each in told:
        assert each["gathered"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert each["shared"] == [0, "first"]


def test_tensors_arrive_in_the_order_in_which_they_were_sent(told: list[dict[str, Any]]) -> None:
    for rank, each in enumerate(told):
        before = (rank - 1) % 3
        assert each["arrived"] == [[before, before], [before + 0.5, before + 0.5]]


def test_ranks_that_are_gone_are_named(told: list[dict[str, Any]]) -> None:
    assert told[0]["error"].startswith("DeviceError: Rank")
    assert "1" in told[0]["error"].partition("gone")[0]


def test_a_rank_that_does_not_answer_is_named_when_patience_ends() -> None:
    told = _world(2, "silent")
    assert told[0]["error"].startswith("TimeoutExpired: Rank 1 of 2 did not answer rank 0 within 2 s")
    assert told[0]["waited_s"] >= 2


def test_a_process_that_is_alone_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert join("cpu") is None
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "1"),
    ):
        monkeypatch.setenv(name, value)
    assert join("cpu") is None
