"""Scratch space on disk: reserved before it is used, and never seen by anybody else."""

import errno
import os
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.errors import DoesNotFit, InputError
from capstan.storage import DiskSlab
from capstan.storage.slab import ALIGNMENT, aligned


def _pattern(size_bytes: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (size_bytes,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def _read(disk: DiskSlab, offset: int, size_bytes: int) -> torch.Tensor:
    target = torch.empty(size_bytes, dtype=torch.uint8)
    disk.read(offset, target)
    return target


def test_no_file_is_visible_not_even_while_it_is_open(tmp_path):
    with DiskSlab(tmp_path, 1 << 20) as disk:
        disk.write(0, _pattern(1 << 20, 0))
        assert os.listdir(tmp_path) == []
    assert os.listdir(tmp_path) == []


def test_the_space_is_reserved_at_once_and_given_back_at_the_end(tmp_path):
    def opened() -> dict[str, int]:
        links = {name: f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")}
        return {name: os.stat(link).st_size for name, link in links.items() if os.path.exists(link)}

    before = opened()
    disk = DiskSlab(tmp_path, 3_000_001)
    added = {name: size for name, size in opened().items() if name not in before}
    assert list(added.values()) == [3_000_001]
    (descriptor,) = map(int, added)
    assert os.fstat(descriptor).st_nlink == 0
    assert os.fstat(descriptor).st_blocks * 512 >= 3_000_001
    disk.close()
    assert opened().keys() == before.keys()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=12))
def test_pieces_are_aligned_do_not_overlap_and_read_back(tmp_path_factory, sizes):
    with DiskSlab(tmp_path_factory.getbasetemp() / "scratch", sum(map(aligned, sizes))) as disk:
        offsets = [disk.take(size) for size in sizes]
        for seed, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            assert offset % ALIGNMENT == 0
            disk.write(offset, _pattern(size, seed))
        for seed, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            assert torch.equal(_read(disk, offset, size), _pattern(size, seed))


def test_two_slabs_in_one_folder_are_apart(tmp_path):
    with DiskSlab(tmp_path, 1000) as one, DiskSlab(tmp_path, 1000) as other:
        one.write(0, _pattern(1000, 1))
        other.write(0, _pattern(1000, 2))
        assert torch.equal(_read(one, 0, 1000), _pattern(1000, 1))


def test_a_missing_folder_is_made(tmp_path):
    with DiskSlab(tmp_path / "deep" / "scratch", 100) as disk:
        disk.write(0, _pattern(100, 0))
        assert torch.equal(_read(disk, 0, 100), _pattern(100, 0))


def test_more_than_is_left_does_not_fit(tmp_path):
    with DiskSlab(tmp_path, 1000) as disk:
        disk.take(65)
        with pytest.raises(DoesNotFit, match=r"has 1,000 bytes, 128 in use; 873 more"):
            disk.take(873)
        assert disk.used_bytes == 128
        assert disk.take(872) == 128


def test_an_empty_slab_takes_nothing(tmp_path):
    with DiskSlab(tmp_path, 0) as disk:
        assert disk.take(0) == 0
        with pytest.raises(DoesNotFit):
            disk.take(1)


def test_a_disk_that_is_full_at_reservation_does_not_fit_and_leaves_nothing(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    num_open = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DoesNotFit, match=r"scratch file of 5,000 bytes: No space left on device.*--disk"):
        DiskSlab(tmp_path, 5000)
    assert len(os.listdir("/proc/self/fd")) == num_open
    assert os.listdir(tmp_path) == []


@pytest.fixture
def files_of_at_most_a_mebibyte():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("files_of_at_most_a_mebibyte")
def test_what_the_limit_on_file_sizes_forbids_does_not_fit(tmp_path):
    with DiskSlab(tmp_path, 1 << 20) as disk:
        disk.write(0, _pattern(1 << 20, 0))
    with pytest.raises(DoesNotFit, match="File too large"):
        DiskSlab(tmp_path, (1 << 20) + 1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("below", [".", "scratch"])
def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"No scratch file can be made in .*file"):
        DiskSlab(tmp_path / "file" / below, 100)


def test_closing_twice_is_harmless(tmp_path):
    disk = DiskSlab(tmp_path, 100)
    disk.close()
    disk.close()
