"""Huge pages: asked for, and done without where there are none."""

import ctypes
import mmap

import pytest

from capstan.hardware import huge_pages
from capstan.hardware.direct_io import BLOCK_BYTES, NUM_REQUESTS, request_buffers
from capstan.hardware.huge_pages import HUGE_PAGE_BYTES, huge_page_memory


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def test_memory_starts_where_a_huge_page_may_start_and_has_the_size_asked_for() -> None:
    for size_bytes in (1, 4097, 3 * HUGE_PAGE_BYTES):
        memory = huge_page_memory(size_bytes)
        assert len(memory) == size_bytes
        assert _address(memory) % HUGE_PAGE_BYTES == 0
        memory[-1] = 7
        assert memory[-1] == 7


def test_each_request_has_a_block_of_its_own_at_a_page() -> None:
    buffers = request_buffers()
    for number, buffer in enumerate(buffers):
        buffer[:] = bytes([number]) * BLOCK_BYTES
    assert [bytes(buffer) == bytes([number]) * BLOCK_BYTES for number, buffer in enumerate(buffers)] == [
        True
    ] * NUM_REQUESTS
    assert all(_address(buffer) % mmap.PAGESIZE == 0 for buffer in buffers)


@pytest.mark.parametrize("advice", [None, -1], ids=["unknown to Python", "refused by the kernel"])
def test_ordinary_pages_do_where_there_are_no_huge_ones(
    monkeypatch: pytest.MonkeyPatch, advice: int | None
) -> None:
    monkeypatch.setattr(huge_pages.mmap, "MADV_HUGEPAGE", advice, raising=False)
    memory = huge_page_memory(4096)
    memory[:] = bytes(4096)
    assert len(memory) == 4096
