"""Direct I/O: the same bytes as ever from any place to any place, whether it is allowed or refused."""

import ctypes
import errno
import fcntl
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.errors import DoesNotFit, InputError
from capstan.hardware.direct_io import BLOCK_BYTES, NUM_REQUESTS, SECTOR_BYTES
from capstan.storage import DiskSlab
from capstan.storage.disk_requests import DiskRequests
from capstan.storage.file_ranges import FileRanges

SIZE_BYTES = 3 * BLOCK_BYTES + 5_001  # the end is no sector's
CONTENT = torch.randint(0, 256, (SIZE_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("direct") / "file"
    path.write_bytes(CONTENT.numpy().tobytes())
    return path


@pytest.fixture
def ranges(path):
    ranges = FileRanges(os.open(path, os.O_RDONLY), path.name)
    yield ranges
    ranges.close()


def _read(ranges: FileRanges, offset: int, size_bytes: int, *, shift: int = 0) -> torch.Tensor:
    """Read into memory that starts `shift` bytes after an aligned address, touching no more than that."""
    memory = torch.full((shift + size_bytes + 64,), 0xAA, dtype=torch.uint8)
    ranges.read(offset, memory[shift : shift + size_bytes])
    assert (memory[:shift] == 0xAA).all()
    assert (memory[shift + size_bytes :] == 0xAA).all()
    return memory[shift : shift + size_bytes]


def _is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.fixture
def direct_calls(monkeypatch, path) -> list[str]:
    """The names of the direct calls made; skips where the file system allows none."""
    calls: list[str] = []
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system refuses direct I/O")
    for name in ("preadv", "pwritev"):
        original = getattr(os, name)

        def noted(descriptor, *rest, name=name, original=original):
            if _is_direct(descriptor):
                calls.append(name)
            return original(descriptor, *rest)

        monkeypatch.setattr(os, name, noted)
    return calls


def _failing_when_direct(name: str, number: int) -> tuple[Callable[..., Any], list[int]]:
    """`os.name`, except that it raises this error on a direct descriptor; and where it did so."""
    original, refused = getattr(os, name), []

    def call(descriptor, *rest):
        if _is_direct(descriptor):
            refused.append(descriptor)
            raise OSError(number, os.strerror(number))
        return original(descriptor, *rest)

    return call, refused


# --- the same bytes ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    start=st.integers(0, SIZE_BYTES) | st.sampled_from([0, 1, SECTOR_BYTES - 1, SECTOR_BYTES, BLOCK_BYTES]),
    end=st.integers(0, SIZE_BYTES) | st.sampled_from([SIZE_BYTES, 3 * BLOCK_BYTES, 3 * BLOCK_BYTES + 1]),
    shift=st.integers(0, 64),
)
def test_any_range_into_any_memory_equals_the_file(path, start, end, shift):
    start, end = sorted((start, end))
    ranges = FileRanges(os.open(path, os.O_RDONLY), path.name)
    try:
        assert torch.equal(_read(ranges, start, end - start, shift=shift), CONTENT[start:end])
    finally:
        ranges.close()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, SIZE_BYTES),
            st.integers(1, 5000) | st.integers(BLOCK_BYTES, 2 * BLOCK_BYTES + 5000),
            st.booleans(),
        ),
        min_size=2,
        max_size=8,
    )
)
def test_writes_and_reads_of_all_sizes_see_each_other(tmp_path_factory, steps):
    """Small ones go through the page cache and large ones past it, on the same sectors."""
    model = torch.zeros(SIZE_BYTES, dtype=torch.uint8)
    with DiskSlab(tmp_path_factory.getbasetemp() / "scratch", SIZE_BYTES) as disk:
        for number, (start, size, is_write) in enumerate(steps):
            end = min(start + size, SIZE_BYTES)
            if is_write:
                model[start:end] = CONTENT[: end - start] ^ number
                disk.write(start, model[start:end].clone())
            target = torch.empty(end - start, dtype=torch.uint8)
            disk.read(start, target)
            assert torch.equal(target, model[start:end])
        target = torch.empty_like(model)
        disk.read(0, target)
        assert torch.equal(target, model)


def test_large_ranges_go_past_the_page_cache_also_in_a_file_without_a_name(direct_calls, tmp_path, ranges):
    _read(ranges, 5, 2 * BLOCK_BYTES)
    assert set(direct_calls) == {"preadv"}
    with DiskSlab(tmp_path, SIZE_BYTES) as disk:
        disk.write(64, CONTENT[:-64])
        assert set(direct_calls) == {"preadv", "pwritev"}
        direct_calls.clear()
        target = torch.empty_like(CONTENT)
        disk.read(0, target)
        assert set(direct_calls) == {"preadv"}
    assert torch.equal(target[64:], CONTENT[:-64])


def test_small_ranges_are_read_the_ordinary_way_and_open_nothing(direct_calls, ranges):
    num_open = len(os.listdir("/proc/self/fd"))
    _read(ranges, 5, BLOCK_BYTES)
    assert direct_calls == []
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_concurrent_reads_do_not_mix_their_bytes(ranges):
    starts = [number * 12_345 for number in range(24)]
    size_bytes = BLOCK_BYTES + 54_321
    with ThreadPoolExecutor(6) as readers:
        found = list(readers.map(lambda start: _read(ranges, start, size_bytes), starts))
    assert all(
        torch.equal(each, CONTENT[start : start + size_bytes])
        for each, start in zip(found, starts, strict=True)
    )


# --- the end of the file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 4096, SIZE_BYTES - BLOCK_BYTES - 1])
def test_a_range_that_ends_where_the_file_ends_is_read_whole(ranges, start):
    assert torch.equal(_read(ranges, start, SIZE_BYTES - start), CONTENT[start:])


@pytest.mark.parametrize("start", [0, 77, SIZE_BYTES - 1, SIZE_BYTES, SIZE_BYTES + 9])
def test_a_large_range_beyond_the_end_is_an_input_error_that_says_where_the_file_ends(ranges, start):
    ends = f"{max(start, SIZE_BYTES):,}"
    with pytest.raises(InputError, match=rf"file ends at byte {ends}, .*truncated"):
        ranges.read(start, torch.empty(SIZE_BYTES + 2 * BLOCK_BYTES, dtype=torch.uint8))


# --- refusal ----------------------------------------------------------------------------------------------

REFUSALS = [errno.EINVAL, errno.EOPNOTSUPP]


@pytest.mark.parametrize("number", [*REFUSALS, errno.ENOENT], ids=errno.errorcode.get)
def test_where_direct_io_is_refused_at_opening_the_ordinary_way_is_taken(monkeypatch, tmp_path, number):
    attempts, original = [], os.open

    def refusing(name, flags, *rest, **named):
        if flags & os.O_DIRECT:
            attempts.append(name)
            raise OSError(number, os.strerror(number))
        return original(name, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)
    with DiskSlab(tmp_path, SIZE_BYTES) as disk:
        disk.write(0, CONTENT)
        target = torch.empty_like(CONTENT)
        disk.read(0, target)
    assert torch.equal(target, CONTENT)
    assert len(attempts) == 1


@pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.get)
def test_where_direct_io_is_refused_at_the_first_read_the_ordinary_way_is_taken(monkeypatch, ranges, number):
    call, refused = _failing_when_direct("preadv", number)
    monkeypatch.setattr(os, "preadv", call)
    assert torch.equal(_read(ranges, 3, SIZE_BYTES - 3), CONTENT[3:])
    attempts = len(refused)
    assert attempts <= NUM_REQUESTS  # those in flight when the first was refused
    _read(ranges, 3, SIZE_BYTES - 3)
    assert len(refused) == attempts


@pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.get)
def test_where_direct_io_is_refused_at_the_first_write_the_ordinary_way_is_taken(
    monkeypatch, tmp_path, number
):
    monkeypatch.setattr(os, "pwritev", _failing_when_direct("pwritev", number)[0])
    with DiskSlab(tmp_path, SIZE_BYTES) as disk:
        disk.write(0, CONTENT)
        target = torch.empty_like(CONTENT)
        disk.read(0, target)
    assert torch.equal(target, CONTENT)


@pytest.mark.usefixtures("direct_calls")
def test_a_failing_disk_is_an_input_error_also_directly(monkeypatch, ranges):
    monkeypatch.setattr(os, "preadv", _failing_when_direct("preadv", errno.EIO)[0])
    with pytest.raises(InputError, match=r"of file failed: Input/output error"):
        _read(ranges, 0, SIZE_BYTES)


@pytest.mark.usefixtures("direct_calls")
def test_a_full_disk_does_not_fit_also_directly(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "pwritev", _failing_when_direct("pwritev", errno.ENOSPC)[0])
    with DiskSlab(tmp_path, SIZE_BYTES) as disk, pytest.raises(DoesNotFit, match="No space left on device"):
        disk.write(0, CONTENT)


def test_closing_closes_both_ways(path):
    num_open = len(os.listdir("/proc/self/fd"))
    ranges = FileRanges(os.open(path, os.O_RDONLY), path.name)
    _read(ranges, 0, SIZE_BYTES)
    ranges.close()
    ranges.close()
    assert len(os.listdir("/proc/self/fd")) == num_open


# --- requests in flight -----------------------------------------------------------------------------------


def test_no_request_is_under_way_any_more_when_one_has_failed():
    """The caller may give its memory back then."""
    started, release = threading.Barrier(2), threading.Event()
    ended = []

    def move(offset, view, buffer):
        if offset == 1:
            started.wait(30)
            threading.Timer(0.05, release.set).start()
            raise ValueError("torn cable")
        if offset == 0:
            started.wait(30)
            release.wait(30)
        ended.append(offset)

    requests = DiskRequests()
    with pytest.raises(ValueError, match="torn cable"):
        requests.move(move, [(number, memoryview(b"")) for number in range(2)])
    assert ended == [0]
    requests.close()


def test_the_first_piece_of_those_that_fail_is_the_one_reported():
    def move(offset, view, buffer):
        raise ValueError(f"piece {offset}")

    requests = DiskRequests()
    for _ in range(20):
        with pytest.raises(ValueError, match="piece 0"):
            requests.move(move, [(number, memoryview(b"")) for number in range(20)])
    requests.close()


def test_each_request_has_a_buffer_to_itself_and_hands_it_back_also_when_it_fails():
    in_use: list[int] = []

    def move(offset, view, buffer):
        key = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        assert key not in in_use
        in_use.append(key)
        assert len(buffer) == BLOCK_BYTES
        in_use.remove(key)
        if offset % 3 == 0:
            raise ValueError("torn cable")

    requests = DiskRequests()
    for _ in range(3 * NUM_REQUESTS):
        with pytest.raises(ValueError, match="torn cable"):
            requests.move(move, [(number, memoryview(b"")) for number in range(2 * NUM_REQUESTS)])
    requests.close()
