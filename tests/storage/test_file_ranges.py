"""Byte ranges: large or interrupted, they move whole or not at all."""

import ctypes
import errno
import mmap
import os
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.errors import DoesNotFit, InputError
from capstan.storage import file_ranges
from capstan.storage.file_ranges import FileRanges

CONTENT = bytes(torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(0)).tolist())


def _open(path: Path, flags: int = os.O_RDWR) -> FileRanges:
    return FileRanges(os.open(path, flags), path.name)


def _flat(content: bytes) -> torch.Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ranges") / "file"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("written") / "file"


ranges_and_pieces = st.tuples(
    st.integers(0, len(CONTENT)), st.integers(0, len(CONTENT)), st.integers(1, 2000)
).map(lambda drawn: (*sorted(drawn[:2]), drawn[2]))


@settings(max_examples=50, deadline=None)
@given(ranges_and_pieces)
def test_a_read_in_pieces_equals_a_plain_read(path, drawn):
    start, end, piece_bytes = drawn
    ranges, target = _open(path), torch.zeros(end - start, dtype=torch.uint8)
    with mock.patch.object(file_ranges, "_REQUEST_BYTES", piece_bytes):
        ranges.read(start, target)
    ranges.close()
    assert bytes(target.tolist()) == CONTENT[start:end]


@settings(max_examples=50, deadline=None)
@given(ranges_and_pieces)
def test_a_write_in_pieces_equals_a_plain_write(written, drawn):
    start, end, piece_bytes = drawn
    written.write_bytes(bytes(len(CONTENT)))
    ranges = _open(written)
    with mock.patch.object(file_ranges, "_REQUEST_BYTES", piece_bytes):
        ranges.write(start, _flat(CONTENT[start:end]))
    ranges.close()
    assert written.read_bytes() == bytes(start) + CONTENT[start:end] + bytes(len(CONTENT) - end)


def test_more_than_one_real_request_is_moved_whole(tmp_path):
    size_bytes = 2 * file_ranges._REQUEST_BYTES + 12_345
    source = torch.randint(0, 256, (size_bytes,), dtype=torch.uint8)
    (tmp_path / "file").touch()
    ranges, target = _open(tmp_path / "file"), torch.empty_like(source)
    ranges.write(7, source)
    ranges.read(7, target)
    ranges.close()
    assert torch.equal(target, source)
    assert (tmp_path / "file").read_bytes()[7:] == source.numpy().tobytes()


def test_short_reads_and_writes_are_continued(monkeypatch, tmp_path):
    """A signal or a full pipe may let a system call move less than it was asked to."""
    (tmp_path / "file").touch()
    read, write = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda file, views, offset: read(file, [views[0][:700]], offset))
    monkeypatch.setattr(os, "pwritev", lambda file, views, offset: write(file, [views[0][:900]], offset))
    ranges, target = _open(tmp_path / "file"), torch.empty(len(CONTENT), dtype=torch.uint8)
    ranges.write(0, _flat(CONTENT))
    ranges.read(0, target)
    ranges.close()
    assert bytes(target.tolist()) == CONTENT


@pytest.mark.parametrize("piece_bytes", [512, 1 << 20], ids=["in pieces", "at once"])
def test_reading_past_the_end_is_an_input_error_that_names_the_file(monkeypatch, path, piece_bytes):
    monkeypatch.setattr(file_ranges, "_REQUEST_BYTES", piece_bytes)
    ranges = _open(path)
    with pytest.raises(InputError, match=r"file ends at byte 5,000, .*truncated"):
        ranges.read(1000, torch.empty(len(CONTENT), dtype=torch.uint8))
    ranges.close()


@pytest.mark.parametrize("piece_bytes", [512, 1 << 20], ids=["in pieces", "at once"])
def test_a_full_disk_does_not_fit(monkeypatch, piece_bytes):
    monkeypatch.setattr(file_ranges, "_REQUEST_BYTES", piece_bytes)
    ranges = _open(Path("/dev/full"), os.O_WRONLY)
    with pytest.raises(DoesNotFit, match=r"to full failed: No space left on device"):
        ranges.write(0, _flat(CONTENT))
    ranges.close()


def test_a_disk_that_fills_up_half_way_does_not_fit(monkeypatch, tmp_path):
    """The first call moves what there is room for, the second finds none."""
    write = os.pwritev

    def until_full(file, views, offset):
        if offset >= 2000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, [views[0][: 2000 - offset]], offset)

    monkeypatch.setattr(os, "pwritev", until_full)
    (tmp_path / "file").touch()
    ranges = _open(tmp_path / "file")
    with pytest.raises(DoesNotFit, match=r"Writing 3,000 bytes to file failed: No space left on device"):
        ranges.write(0, _flat(CONTENT))
    ranges.close()


def test_close_ends_the_threads_and_closes_the_file(path, monkeypatch):
    monkeypatch.setattr(file_ranges, "_REQUEST_BYTES", 512)
    num_open = len(os.listdir("/proc/self/fd"))
    ranges = _open(path)
    ranges.read(0, torch.empty(len(CONTENT), dtype=torch.uint8))
    assert _num_disk_threads() > 0
    ranges.close()
    assert _num_disk_threads() == 0
    assert len(os.listdir("/proc/self/fd")) == num_open


def _num_disk_threads() -> int:
    return sum(thread.name.startswith("capstan disk") for thread in threading.enumerate())


def _num_cached_pages(path: Path) -> int:
    """Pages of `path` that lie in the page cache."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        num_pages = -(-len(mapping) // mmap.PAGESIZE)
        resident = (ctypes.c_ubyte * num_pages)()
        first = ctypes.c_ubyte.from_buffer(mapping)
        libc = ctypes.CDLL(None, use_errno=True)
        status = libc.mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapping)), resident
        )
        del first
        assert status == 0, os.strerror(ctypes.get_errno())
        return sum(page & 1 for page in resident)


@pytest.fixture
def uncached(tmp_path) -> Path:
    """A file of 10 MB of which nothing lies in the page cache."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT * 2000)
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
    if _num_cached_pages(path) > 0:
        pytest.skip("this file system keeps its pages whatever it is told")
    return path


def test_reads_leave_nothing_behind_in_the_page_cache(uncached):
    size_bytes = uncached.stat().st_size
    file = os.open(uncached, os.O_RDONLY)
    os.pread(file, size_bytes, 0)
    assert _num_cached_pages(uncached) == -(-size_bytes // mmap.PAGESIZE)  # an ordinary read would be seen
    ranges = FileRanges(file, "file")
    ranges.read(0, torch.empty(size_bytes, dtype=torch.uint8))
    ranges.close()
    assert _num_cached_pages(uncached) <= 1  # an incomplete last page may stay


def test_large_writes_leave_only_their_edges_in_the_page_cache(uncached):
    """Where direct I/O is allowed; elsewhere they are at least being written back."""
    ranges = _open(uncached)
    ranges.write(77, _flat(CONTENT).repeat(1000))
    os.fsync(ranges._descriptor)
    if ranges._direct._is_refused:
        os.posix_fadvise(ranges._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    ranges.close()
    assert _num_cached_pages(uncached) <= 2
    assert uncached.read_bytes() == CONTENT[:77] + CONTENT * 1000 + CONTENT[77:] + CONTENT * 999
