"""The profile: what a probe found, kept as a dated JSON file so that planning need not measure again."""

import logging
import os
import re
import secrets
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from capstan.errors import InputError
from capstan.hardware.cache_folder import cache_folder
from capstan.hardware.free_memory import free_cuda_memory, free_disk, free_host_memory
from capstan.hardware.machine import Device, Machine
from capstan.hardware.probe_machine import cuda_name, device_kind, probe

logger = logging.getLogger(__name__)
QUICK_BUDGET_S = 4.0


def profile_path(device: str = "auto") -> Path:
    """The profile's file in the cache folder: one for each host and kind of device."""
    host = re.sub(r"[^A-Za-z0-9._-]", "_", socket.gethostname())
    return cache_folder() / f"machine-{host}-{device_kind(device)}.json"


def load_profile(path: Path | None = None) -> Machine:
    """The machine that was saved there, exactly as it was measured; `InputError` when it is damaged."""
    place = path if path is not None else profile_path()
    try:
        text = place.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise InputError(f"There is no machine profile at {place}. Make one with: capstan probe") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The machine profile {place} cannot be read: {error}. Probe again.") from error
    return Machine.from_json(text, source=f"The machine profile {place}")


def save_profile(machine: Machine, path: Path | None = None) -> Path:
    """Write the profile so that a reader finds the old one or the new one, never half of one."""
    place = path if path is not None else profile_path(machine.device("device").kind)
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(machine.to_json())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)
    return place


def this_machine(
    *,
    device: str = "auto",
    fresh: bool = False,
    budget_s: float = QUICK_BUDGET_S,
    disk_dir: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Machine:
    """This machine: from its profile with free memory as of now, or else measured quickly and saved.

    `fresh` measures in any case. `disk_dir` measures when the profile is about another folder's disk.
    A profile that is damaged, or of other hardware, is measured again and replaced.
    """
    kind = device_kind(device)
    known = None if fresh else _usable_profile(kind, disk_dir)
    if known is not None:
        return known
    machine = probe(device=kind, disk_dir=disk_dir, budget_s=budget_s, progress=progress)
    try:
        save_profile(machine)
    except OSError as error:
        logger.warning("The machine profile cannot be kept, so it will be measured each time: %s", error)
    return machine


def _usable_profile(kind: str, disk_dir: Path | None) -> Machine | None:
    path = profile_path(kind)
    if not path.exists():
        return None
    try:
        machine = load_profile(path)
        reason = _why_not(machine, kind, disk_dir)
    except InputError as error:
        logger.warning("%s Measuring again.", error)
        return None
    if reason:
        logger.info("The machine profile %s is not used: %s. Measuring again.", path, reason)
        return None
    return _with_free_memory_of_now(machine)


def _why_not(machine: Machine, kind: str, disk_dir: Path | None) -> str | None:
    """Why a profile does not describe this machine as asked; None when it does."""
    if [device.kind for device in machine.devices] != [kind, "host", "disk"]:
        return "it has other tiers"
    if machine.name != socket.gethostname():
        return f"it is of the host {machine.name}"
    device, _, disk = machine.devices
    if kind == "cuda" and device.identity != cuda_name():
        return f"it is of {device.identity}"
    folder = Path(disk.identity)
    if not folder.is_dir():
        return f"its disk was measured in {folder}, which is gone"
    if disk_dir is not None and disk_dir.resolve() != folder:
        return f"its disk was measured in {folder}"
    return None


def _with_free_memory_of_now(machine: Machine) -> Machine:
    devices = (replace(device, memory_bytes=_free_now(device)) for device in machine.devices)
    return replace(machine, devices=tuple(devices))


def _free_now(device: Device) -> int:
    if device.kind == "cuda":
        return free_cuda_memory()
    if device.kind == "disk":
        return free_disk(Path(device.identity))
    return free_host_memory().value
