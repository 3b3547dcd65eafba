"""The ledger is exact, also when many threads write at once."""

import threading
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capstan.plans import Traffic
from capstan.transport import Ledger

NUM_THREADS, NUM_COUNTS = 8, 200


class _Yielding(int):
    """A size whose addition lets other threads run between the reading and the writing of a counter."""

    def __radd__(self, other: int) -> int:
        threading.Event().wait(1e-6)
        return int(other) + int(self)


class _YieldingSeconds(float):
    def __radd__(self, other: float) -> float:
        threading.Event().wait(1e-6)
        return float(other) + float(self)


def _fill_from_many_threads(ledger: Ledger) -> None:
    start = threading.Barrier(NUM_THREADS)

    def work() -> None:
        start.wait(timeout=30)
        for _ in range(NUM_COUNTS):
            ledger.count("host->device", "weights", _Yielding(3))
            ledger.spend("host->device", _YieldingSeconds(0.5))

    threads = [threading.Thread(target=work) for _ in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_nothing_is_lost_when_many_threads_count():
    ledger = Ledger()
    _fill_from_many_threads(ledger)
    assert ledger.traffic == Traffic({("host->device", "weights"): 3 * NUM_THREADS * NUM_COUNTS})
    assert ledger.busy_s == {"host->device": 0.5 * NUM_THREADS * NUM_COUNTS}


def test_the_threads_above_would_lose_bytes_without_the_lock():
    ledger = Ledger()
    ledger._lock = nullcontext()
    _fill_from_many_threads(ledger)
    assert ledger.traffic.on("host->device") < 3 * NUM_THREADS * NUM_COUNTS
    assert ledger.busy_s["host->device"] < 0.5 * NUM_THREADS * NUM_COUNTS


counts = st.lists(
    st.tuples(st.sampled_from(["a->b", "b->a"]), st.sampled_from(["weights", "cache"]), st.integers(0, 2**50))
)


@given(counts)
def test_traffic_is_the_sum_of_all_counts(counts):
    ledger = Ledger()
    for link, content, size_bytes in counts:
        ledger.count(link, content, size_bytes)
    assert ledger.traffic == Traffic.total(
        Traffic({(link, content): size_bytes}) for link, content, size_bytes in counts
    )


def test_what_was_read_does_not_change_afterwards():
    ledger = Ledger()
    ledger.count("a->b", "cache", 5)
    ledger.spend("a->b", 1.0)
    traffic, busy_s = ledger.traffic, ledger.busy_s
    ledger.count("a->b", "cache", 7)
    ledger.spend("a->b", 1.0)
    busy_s["a->b"] += 100
    assert traffic.on("a->b") == 5
    assert (ledger.traffic - traffic).on("a->b") == 7
    assert ledger.busy_s == {"a->b": pytest.approx(2.0)}


def test_a_new_ledger_is_empty():
    assert Ledger().traffic == Traffic()
    assert Ledger().busy_s == {}
