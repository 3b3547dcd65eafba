"""A file that is written atomically is there whole or not at all."""

import errno
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capstan.errors import DoesNotFit, InputError
from capstan.storage import open_atomically, write_atomically


@given(before=st.none() | st.binary(), after=st.binary() | st.text())
def test_what_is_written_is_read_and_nothing_else_is_left(tmp_path_factory, before, after):
    folder = tmp_path_factory.mktemp("atomic")
    path = folder / "deep" / "file"
    if before is not None:
        write_atomically(path, before)
    write_atomically(path, after)
    assert path.read_bytes() == (after.encode() if isinstance(after, str) else after)
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("existed", [True, False])
def test_a_block_that_fails_changes_nothing(tmp_path, existed):
    path = tmp_path / "file"
    if existed:
        path.write_bytes(b"before")

    def fail() -> None:
        with open_atomically(path) as file:
            file.write(b"half of it")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == (
        [("file", b"before")] if existed else []
    )


def test_a_reader_sees_the_old_file_until_the_block_ends(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"before")
    with open_atomically(path) as file:
        file.write(b"after")
        file.flush()
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"


def test_a_full_disk_says_to_free_space(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DoesNotFit, match=r"Writing .*file failed: No space left on device. Free space"):
        write_atomically(tmp_path / "file", b"data")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_the_block_writes_says_so_too(tmp_path):
    def write() -> None:
        with open_atomically(tmp_path / "file"), open("/dev/full", "wb", buffering=0) as full:
            full.write(b"data")

    with pytest.raises(DoesNotFit, match="No space left on device"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/below cannot be written: .*Name another place"):
        write_atomically(tmp_path / "file" / "below", b"data")


def test_durable_files_and_blocks_need_no_torch():
    program = (
        "import sys\n"
        "from capstan.storage import AppendLog, NumpyBlocks, open_atomically, write_atomically\n"
        "assert 'torch' not in sys.modules\n"
        "from capstan.storage import Slab\n"
        "assert 'torch' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
