"""Hearts that stop are found, waits are followed to whom they wait for, and the first loss holds."""

import time

import pytest
import torch.distributed as dist

from capstan.transport import liveness
from capstan.transport.liveness import BEAT_S, Liveness, Loss


@pytest.fixture
def store(tmp_path) -> dist.Store:
    return dist.FileStore(str(tmp_path / "store"), 3)


@pytest.fixture
def three(store) -> list[Liveness]:
    return [Liveness(store, rank) for rank in range(3)]


def test_a_heart_that_stops_is_found_and_no_other(three):
    assert three[0].stopped([1, 2]) == []
    three[2]._heart.stop.set()
    assert three[0].stopped([1, 2]) == [2]
    assert three[1].stopped([0, 2]) == [2]


def test_a_rank_that_was_dropped_beats_no_more(store, monkeypatch):
    monkeypatch.setattr(liveness, "GRACE_S", 1.0)
    looking, other = Liveness(store, 0), Liveness(store, 1)
    heart = other._heart
    del other
    assert heart.stop.is_set()
    assert looking.stopped([1]) == [1]


def test_who_waits_is_followed_to_the_one_that_keeps_all_waiting(three):
    with three[0].waiting_for(1), three[1].waiting_for(2):
        time.sleep(4 * BEAT_S)
        assert three[0].end_of_chain(1) == 2
        assert three[0].end_of_chain(2) == 2
        with three[2].waiting_for(0):
            time.sleep(4 * BEAT_S)
            assert three[0].end_of_chain(1) == 1, "they wait in a ring: nobody is to blame more than another"
    time.sleep(4 * BEAT_S)
    assert three[0].end_of_chain(1) == 1


def test_the_first_loss_is_everybodys(three, monkeypatch):
    monkeypatch.setattr(liveness, "GRACE_S", 0.2)
    assert three[0].awaited() is None
    first = Loss("silent", [2], 1)
    assert three[1].agree(first) == first
    assert three[0].agree(Loss("gone", [1], 0)) == first
    assert three[0].awaited() == first
