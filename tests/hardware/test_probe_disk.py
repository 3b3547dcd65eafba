import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capstan.errors import DeviceError
from capstan.hardware import direct_io
from capstan.hardware.direct_io import BLOCK_BYTES, unnamed_file
from capstan.hardware.probe_disk import disk_rates, file_system_of
from capstan.hardware.time_slice import TimeSlice

Opener = Callable[..., int]


def failing(original: Callable[..., Any], number: int, when: Callable[..., bool]) -> Callable[..., Any]:
    """`original`, except that it raises an error of that number in the given cases."""

    def call(*args: Any) -> Any:
        if when(*args):
            raise OSError(number, os.strerror(number))
        return original(*args)

    return call


def is_direct_open(path: Any, flags: int, *_: Any) -> bool:
    return bool(flags & os.O_DIRECT)


def test_rates_and_latencies_are_found(tmp_path: Path) -> None:
    rates = disk_rates(tmp_path, TimeSlice(0.3))
    assert min(rates[:4]) > 0
    assert str(tmp_path) in rates.notes[0]
    assert os.listdir(tmp_path) == []


def test_a_refusal_of_direct_io_at_opening_falls_back_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", failing(os.open, errno.EINVAL, is_direct_open))
    rates = disk_rates(tmp_path, TimeSlice(0.2))
    assert min(rates[:4]) > 0
    assert any("refuses direct I/O" in note for note in rates.notes)
    assert "dropped from the page cache" in rates.notes[0]
    assert os.listdir(tmp_path) == []


def test_a_refusal_of_direct_io_at_the_first_write_falls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = iter([True])
    monkeypatch.setattr(os, "pwritev", failing(os.pwritev, errno.EINVAL, lambda *_: next(refusals, False)))
    rates = disk_rates(tmp_path, TimeSlice(0.2))
    assert any("refuses direct I/O" in note for note in rates.notes)


def test_a_folder_that_cannot_be_written_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", failing(os.open, errno.EROFS, lambda *_: True))
    with pytest.raises(DeviceError, match=f"{tmp_path} .*Read-only file system.*--disk FOLDER"):
        disk_rates(tmp_path, TimeSlice(0.1))


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"no_such_folder .*--disk FOLDER"):
        disk_rates(tmp_path / "no_such_folder", TimeSlice(0.1))


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DeviceError, match=r"file .*Not a directory"):
        disk_rates(tmp_path / "file", TimeSlice(0.1))


def test_a_disk_with_too_little_left_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capstan.hardware.probe_disk.free_disk", lambda folder: 15 * BLOCK_BYTES)
    with pytest.raises(DeviceError, match=r"needs 4 MiB .* 0\.01 GiB free"):
        disk_rates(tmp_path, TimeSlice(0.1))


def test_a_disk_that_becomes_full_while_probed_is_reported_and_left_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        os, "pwritev", failing(os.pwritev, errno.ENOSPC, lambda _, __, offset: offset >= 2 * BLOCK_BYTES)
    )
    with pytest.raises(DeviceError, match="No space left on device"):
        disk_rates(tmp_path, TimeSlice(1.0))
    assert os.listdir(tmp_path) == []


def test_a_write_that_stops_short_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda *args: original(*args) - 1)
    with pytest.raises(DeviceError, match=r"only 4095 of 4096 bytes"):
        disk_rates(tmp_path, TimeSlice(0.1))


def test_the_file_has_no_name_while_it_is_used_so_a_killed_probe_leaves_nothing(tmp_path: Path) -> None:
    with unnamed_file(tmp_path) as file:
        file.write(4 * BLOCK_BYTES)
        assert os.listdir(tmp_path) == []
        file.read(4 * BLOCK_BYTES)


def test_an_interrupt_between_opening_and_unlinking_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.open

    def interrupted(*args: Any) -> int:
        os.close(original(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt), unnamed_file(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_an_interrupt_in_the_middle_closes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.listdir("/proc/self/fd")

    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "preadv", interrupted)
    with pytest.raises(KeyboardInterrupt), unnamed_file(tmp_path) as file:
        file.read_sector(0)
    assert os.listdir("/proc/self/fd") == before


def test_what_was_written_is_what_is_read(tmp_path: Path) -> None:
    with unnamed_file(tmp_path) as file:
        written = [bytes(buffer) for buffer in file._buffers]
        file.write(direct_io.NUM_REQUESTS * BLOCK_BYTES)
        for buffer in file._buffers:
            buffer[:] = bytes(BLOCK_BYTES)
        file.read(direct_io.NUM_REQUESTS * BLOCK_BYTES)
        assert [bytes(buffer) for buffer in file._buffers] == written


def test_the_innermost_and_last_mount_tells_the_file_system(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"a / ext4 rw 0 0\nb {tmp_path} xfs rw 0 0\nc {tmp_path} tmpfs rw 0 0\nd /dev/shm tmpfs rw 0 0\n"
    )
    assert file_system_of(tmp_path, mounts) == "tmpfs"
    assert file_system_of(Path("/etc"), mounts) == "ext4"
    assert file_system_of(tmp_path, tmp_path / "absent") == "unknown"


def test_a_memory_file_system_is_called_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capstan.hardware.probe_disk.file_system_of", lambda folder: "tmpfs")
    rates = disk_rates(tmp_path, TimeSlice(0.1))
    assert any("lies in memory" in note for note in rates.notes)
