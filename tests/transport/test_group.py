"""Ranks tell each other values and tensors; a wait for one that is gone or silent ends, and names it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capstan.transport.group import join

GROUP_CASES = Path(__file__).with_name("group_cases.py")


@pytest.fixture(scope="module")
def tell(
    fork: Callable[..., Any],
    torchrun: Callable[[int], list[dict[str, str]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[int, str], list[dict[str, Any]]]:
    """`tell(size, fate)`: what so many ranks found, all but the first of which are "gone" or "silent" in the
    end."""

    def tell(size: int, fate: str) -> list[dict[str, Any]]:
        end = str(tmp_path_factory.mktemp("group") / "end")
        ranks = [fork(GROUP_CASES, "tell", fate, end, environment=each) for each in torchrun(size)]
        outputs = [rank.communicate(timeout=60) for rank in ranks]
        for rank, (_, errors) in zip(ranks, outputs, strict=True):
            assert rank.returncode == 0, errors
        return [json.loads(output) for output, _ in outputs]

    return tell


@pytest.fixture(scope="module")
def told(tell: Callable[[int, str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What three ranks found, two of which went away."""
    return tell(3, "gone")


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


def test_a_rank_that_does_not_answer_is_named_when_patience_ends(
    tell: Callable[[int, str], list[dict[str, Any]]],
) -> None:
    told = tell(2, "silent")
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
