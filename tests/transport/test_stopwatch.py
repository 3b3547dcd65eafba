"""Stopwatch: seconds go to the resource that was named."""

from types import SimpleNamespace

import pytest
import torch

from capstan.transport import Lane, Ledger, Stopwatch, lanes, stopwatch

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """Time stands still unless a test moves `now`."""
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(stopwatch, "time", clock)
    monkeypatch.setattr(lanes, "time", clock)
    return clock


def test_each_block_is_booked_to_its_resource(clock):
    ledger = Ledger()
    watch = Stopwatch(ledger, CPU)
    for resource, seconds in [("disk->host", 2.0), ("device compute", 0.25), ("disk->host", 1.0)]:
        with watch.time(resource):
            clock.now += seconds
        clock.now += 50  # between blocks nothing is booked
    assert ledger.busy_s == {"disk->host": 3.0, "device compute": 0.25}


def test_nested_blocks_are_each_booked_in_full(clock):
    ledger = Ledger()
    watch = Stopwatch(ledger, CPU)
    with watch.time("outer"):
        clock.now += 1
        with watch.time("inner"):
            clock.now += 2
    assert ledger.busy_s == {"outer": 3.0, "inner": 2.0}


def test_without_cuda_there_is_nothing_to_settle(clock):
    ledger = Ledger()
    watch = Stopwatch(ledger, CPU)
    with watch.time("device compute"):
        clock.now += 1
    watch.settle()
    assert ledger.busy_s == {"device compute": 1.0}


def test_a_lane_books_its_copies_and_its_blocks(clock):
    class _Slow:
        def copy_(self, source: torch.Tensor, **_: bool) -> None:
            clock.now += 4

    def block(lane: Lane) -> None:
        with lane.booking("disk->host", "weights", 10):
            clock.now += 0.5

    ledger = Ledger()
    with Lane("up", device=CPU, ledger=ledger) as lane:
        lane.submit(lambda: lane.copy(_Slow(), torch.zeros(3), link="host->device", content="cache"))
        lane.submit(lambda: block(lane))
        lane.drain()
    assert ledger.busy_s == {"host->device": 4.0, "disk->host": 0.5}
    assert ledger.traffic.to_dict() == {"disk->host": {"weights": 10}, "host->device": {"cache": 12}}
