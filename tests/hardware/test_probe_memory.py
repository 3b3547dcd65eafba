import pytest

from capstan.hardware import probe_memory
from capstan.hardware.probe_memory import LARGEST_BUFFER_BYTES, SMALLEST_BUFFER_BYTES, host_buffers

MIB = 2**20
GIB = 2**30


@pytest.mark.parametrize(
    ("cache_bytes", "free_bytes", "budget_s", "expected"),
    [
        (32 * MIB, 64 * GIB, 20.0, 128 * MIB),  # four times the cache
        (32 * MIB, GIB, 20.0, 64 * MIB),  # a 16th of free memory
        (32 * MIB, 64 * GIB, 1.0, 42 * MIB),  # what is touched in a sixth of the time
        (8 * GIB, 10**15, 1e6, LARGEST_BUFFER_BYTES),
        (32 * MIB, 0, 20.0, SMALLEST_BUFFER_BYTES),
    ],
)
def test_a_buffer_is_bounded_by_cache_memory_and_time(
    cache_bytes: int, free_bytes: int, budget_s: float, expected: int
) -> None:
    assert probe_memory._buffer_bytes(cache_bytes, free_bytes, budget_s) == expected


def test_buffers_that_a_cache_may_hold_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_memory, "last_level_cache_bytes", lambda: 32 * MIB)
    buffers = host_buffers(GIB, 0.1)
    assert buffers.first.nbytes == buffers.second.nbytes == SMALLEST_BUFFER_BYTES
    assert "may look faster than it is" in buffers.notes[0]


def test_buffers_beyond_the_cache_are_not_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_memory, "last_level_cache_bytes", lambda: MIB)
    assert host_buffers(GIB, 1.0).notes == ()
