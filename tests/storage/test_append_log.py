"""An append log keeps whole lines, whatever happens, and belongs to one writer."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capstan.errors import DoesNotFit, InputError
from capstan.storage import AppendLog

lines = st.lists(st.binary(max_size=12).filter(lambda line: b"\n" not in line), max_size=6)


@given(calls=st.lists(lines, max_size=4), sync_every=st.integers(1, 5), data=st.data())
def test_cut_at_any_byte_it_keeps_the_whole_lines_and_goes_on(tmp_path_factory, calls, sync_every, data):
    path = tmp_path_factory.mktemp("log") / "deep" / "log"
    with AppendLog(path, sync_every=sync_every) as log:
        assert (log.kept, log.torn_bytes) == ([], 0)
        for call in calls:
            log.append(call)
    written = [line for call in calls for line in call]
    whole = path.read_bytes()
    assert whole == b"".join(line + b"\n" for line in written)
    cut = data.draw(st.integers(0, len(whole)))
    os.truncate(path, cut)
    survivors = whole[:cut].count(b"\n")
    with AppendLog(path) as log:
        assert log.kept == written[:survivors]
        assert log.torn_bytes == cut - len(b"".join(line + b"\n" for line in written[:survivors]))
        log.append([b"and on"])
    with AppendLog(path) as log:
        assert (log.kept, log.torn_bytes) == ([*written[:survivors], b"and on"], 0)


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path):
    path = tmp_path / "log"
    with AppendLog(path) as log:
        log.append([b"one"])
        with pytest.raises(InputError, match="Another process is writing .*log"):
            AppendLog(path)
    with AppendLog(path) as log:
        assert log.kept == [b"one"]


def test_a_full_disk_says_that_the_same_command_goes_on():
    log = AppendLog.__new__(AppendLog)
    log.path, log._sync_every, log._unsynced = "/dev/full", 1, 0
    log._file = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(DoesNotFit, match=r"/dev/full failed: No space left.*goes on where it stopped"):
            log.append([b"line"])
    finally:
        os.close(log._file)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot be written: Is a directory"):
        AppendLog(tmp_path)
