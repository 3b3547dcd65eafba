import json
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capstan.errors import InputError
from capstan.hardware import Machine, profile, this_machine
from capstan.hardware.profile import load_profile, profile_path, save_profile


@pytest.fixture
def here(machine: Machine) -> Machine:
    """A machine with the name of this host."""
    return replace(machine, name=socket.gethostname())


@pytest.fixture
def probes(here: Machine, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of a probe that measures nothing and finds one core more than `here` has."""
    calls: list[dict[str, Any]] = []

    def probe(**arguments: Any) -> Machine:
        calls.append(arguments)
        return replace(here, cores=here.cores + 1)

    monkeypatch.setattr(profile, "probe", probe)
    return calls


def test_the_path_names_host_and_kind_under_the_first_cache_that_is_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "ship/one two")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CAPSTAN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert profile_path("cpu") == tmp_path / ".cache/capstan/machine-ship_one_two-cpu.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert profile_path("cpu").parent == Path("/xdg/capstan")
    monkeypatch.setenv("CAPSTAN_CACHE", "/mine")
    assert profile_path("cpu").parent == Path("/mine")


def test_a_saved_profile_loads_as_an_equal_machine(here: Machine, cache: Path) -> None:
    path = save_profile(here)
    assert path == profile_path("cpu")
    assert load_profile(path) == here
    assert os.listdir(cache) == [path.name]


def test_a_profile_may_lie_anywhere(here: Machine, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "box.json"
    assert load_profile(save_profile(here, path)) == here


def test_a_write_that_fails_keeps_the_old_profile(
    here: Machine, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_profile(here)

    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_profile(replace(here, cores=99))
    assert load_profile(path) == here
    assert os.listdir(cache) == [path.name]


def test_a_missing_profile_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="capstan probe"):
        load_profile(tmp_path / "none.json")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'{"format": "capstan.machine"'])
def test_a_damaged_profile_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "box.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"box\.json"):
        load_profile(path)


def test_the_first_call_measures_and_keeps_the_result(
    here: Machine, cache: Path, probes: list[dict[str, Any]]
) -> None:
    first = this_machine(device="cpu", budget_s=1.5)
    again = this_machine(device="cpu")
    assert len(probes) == 1
    assert probes[0]["budget_s"] == 1.5
    assert first.cores == again.cores == here.cores + 1


def test_a_kept_profile_gets_the_free_memory_of_now(
    here: Machine, cache: Path, probes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_profile(here)
    monkeypatch.setattr(profile, "free_disk", lambda folder: 4321)
    machine = this_machine(device="cpu")
    assert not probes
    assert machine.device("disk").memory_bytes == 4321
    assert machine.device("host").memory_bytes not in (0, here.device("host").memory_bytes)
    assert machine.links == here.links


def test_fresh_measures_in_any_case(here: Machine, cache: Path, probes: list[dict[str, Any]]) -> None:
    save_profile(here)
    assert this_machine(device="cpu", fresh=True).cores == here.cores + 1


def other_host(machine: Machine) -> Machine:
    return replace(machine, name="elsewhere")


def other_tiers(machine: Machine) -> Machine:
    return replace(machine, devices=machine.devices[:1], links=())


def other_folder(machine: Machine) -> Machine:
    *memories, disk = machine.devices
    return replace(machine, devices=(*memories, replace(disk, identity="/no/such/folder")))


@pytest.mark.parametrize("change", [other_host, other_tiers, other_folder])
def test_a_profile_of_something_else_is_measured_again(
    here: Machine, cache: Path, probes: list[dict[str, Any]], change: Callable[[Machine], Machine]
) -> None:
    save_profile(change(here), profile_path("cpu"))
    this_machine(device="cpu")
    assert len(probes) == 1


def test_another_folder_is_measured_and_the_same_one_is_not(
    here: Machine, cache: Path, tmp_path: Path, probes: list[dict[str, Any]]
) -> None:
    save_profile(here)
    this_machine(device="cpu", disk_dir=tmp_path)
    assert not probes
    this_machine(device="cpu", disk_dir=cache)
    assert probes[0]["disk_dir"] == cache


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"format": "x", "version": 1})])
def test_a_corrupt_profile_is_logged_measured_again_and_replaced(
    content: str, here: Machine, cache: Path, probes: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    cache.mkdir()
    profile_path("cpu").write_text(content)
    with caplog.at_level(logging.WARNING):
        this_machine(device="cpu")
    assert "Measuring again" in caplog.text
    assert len(probes) == 1
    assert load_profile(profile_path("cpu")).cores == here.cores + 1


def test_a_cache_that_cannot_be_written_is_logged_and_the_machine_still_returned(
    here: Machine,
    tmp_path: Path,
    probes: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CAPSTAN_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        assert this_machine(device="cpu").cores == here.cores + 1
    assert "cannot be kept" in caplog.text


def test_a_cache_that_cannot_be_made_leaves_the_disk_probe_to_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from capstan.hardware.probe_machine import _default_disk_folder

    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CAPSTAN_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert _default_disk_folder() == tmp_path
    monkeypatch.setenv("CAPSTAN_CACHE", str(tmp_path / "cache"))
    assert _default_disk_folder() == tmp_path / "cache"
