"""The probe: measure every device and link of this machine within a budget of time."""

import math
import os
import platform
import socket
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

from capstan import __version__
from capstan.errors import DeviceError, UsageError, require_extra, unknown_name
from capstan.hardware.cache_folder import cache_folder
from capstan.hardware.free_memory import free_cuda_memory, free_disk, free_host_memory, usable_cores
from capstan.hardware.machine import Device, Link, Machine
from capstan.hardware.probe_cuda import cuda_copies, cuda_read_rate
from capstan.hardware.probe_disk import DiskRates, disk_rates
from capstan.hardware.probe_matmul import MatmulRates, matmul_rates
from capstan.hardware.probe_memory import CopyRates, TwoWayRates, host_buffers, host_copies, host_rates
from capstan.hardware.processor import processor_name
from capstan.hardware.time_slice import TimeSlice
from capstan.hardware.units import gb_per_s

DEVICES = ("auto", "cpu", "cuda")
DEFAULT_BUDGET_S = 20.0
SAME_MEMORY = (
    "There is no accelerator in use: host memory plays the device as well, "
    "so what a plan gives to the one it takes from the other."
)


class _Compute(NamedTuple):
    """What was measured of host and device apart from the disk."""

    device: Device
    host: Device
    copies: TwoWayRates
    notes: tuple[str, ...]


def probe(
    *,
    device: str = "auto",
    disk_dir: Path | None = None,
    budget_s: float = DEFAULT_BUDGET_S,
    progress: Callable[[str], None] | None = None,
) -> Machine:
    """Measure this machine in about `budget_s` seconds; importing torch and waking CUDA come on top.

    `device` is "auto", "cuda" or "cpu"; with "cpu" host memory plays the fast device. `disk_dir` is a
    folder on the disk to measure, by default Capstan's cache folder. `progress` gets a line about
    each thing before it is measured. More time gives larger buffers, matrices and files, and more
    repeats; the machine should be otherwise idle.
    """
    if not (math.isfinite(budget_s) and budget_s > 0):
        raise UsageError(f"A probe needs a finite number of seconds above 0, not {budget_s}.")
    kind = device_kind(device)
    folder = disk_dir if disk_dir is not None else _default_disk_folder()
    tell = progress or (lambda line: None)

    busy = _busy_notes(usable_cores().value)
    budget = TimeSlice(budget_s)
    compute = _probe_cuda(budget, tell) if kind == "cuda" else _probe_cpu(budget, tell)
    tell(f"disk under {folder}")
    disk = disk_rates(folder, budget.part(0.5))

    cores = usable_cores()
    return Machine(
        name=socket.gethostname(),
        devices=(compute.device, compute.host, _disk_device(folder, disk)),
        links=_links(compute.copies, disk),
        cores=cores.value,
        probed_at=date.today().isoformat(),
        versions=_versions(),
        notes=(*busy, *compute.notes, *_thread_notes(cores.value, cores.note), *disk.notes),
    )


def device_kind(device: str) -> str:
    """The kind, "cuda" or "cpu", that "auto", "cuda" or "cpu" means on this machine."""
    if device not in DEVICES:
        raise unknown_name("device", device, DEVICES)
    if device == "cpu":
        return "cpu"
    require_extra("torch", "torch")
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "auto":
        return "cpu"
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    raise DeviceError(
        f"A CUDA device was asked for, but torch {torch.__version__} ({built}) finds none here. "
        'Use --device cpu (device="cpu") to let host memory play the device, '
        "or install a driver and a CUDA build of torch."
    )


def _probe_cpu(budget: TimeSlice, tell: Callable[[str], None]) -> _Compute:
    require_extra("torch", "torch")
    free = free_host_memory()
    tell("host memory")
    buffers = host_buffers(free.value, budget.left())
    memory = host_rates(buffers, budget.part(0.05))
    tell("copies between two buffers of host memory")
    copies = host_copies(buffers, budget.part(0.2))
    matmul = matmul_rates("cpu", free.value, budget.part(0.3), tell)
    host = _host_device(free.value, matmul, memory.read_bytes_per_s)
    device = Device(
        name="device",
        kind="cpu",
        memory_bytes=free.value,
        matmul_flops_per_s=matmul.flops_per_s,
        memory_bandwidth_bytes_per_s=memory.read_bytes_per_s,
        identity=host.identity,
    )
    notes = (SAME_MEMORY, *_known(free.note), *buffers.notes, *copies.notes, *matmul.notes)
    return _Compute(device, host, copies, notes)


def _probe_cuda(budget: TimeSlice, tell: Callable[[str], None]) -> _Compute:
    import torch

    free, free_cuda = free_host_memory(), free_cuda_memory()
    try:
        tell("memory of host and device")
        buffers = host_buffers(free.value, budget.left())
        memory = host_rates(buffers, budget.part(0.05))
        read = cuda_read_rate(free_cuda, budget.part(0.05))
        tell("copies between host and device")
        copies = cuda_copies(buffers, free_cuda, budget.part(0.2))
        device_matmul = matmul_rates("cuda", free_cuda, budget.part(0.15), tell)
        host_matmul = matmul_rates("cpu", free.value, budget.part(0.15), tell)
    except torch.cuda.OutOfMemoryError as error:
        raise DeviceError(
            f"The CUDA device ran out of memory while it was probed ({error}). "
            "Wait until other processes have left it, or use --device cpu."
        ) from error
    finally:
        torch.cuda.empty_cache()
    device = Device(
        name="device",
        kind="cuda",
        memory_bytes=free_cuda,
        matmul_flops_per_s=device_matmul.flops_per_s,
        memory_bandwidth_bytes_per_s=read,
        identity=cuda_name(),
    )
    host = _host_device(free.value, host_matmul, memory.read_bytes_per_s)
    copied = f"Host memory copies to host memory at {gb_per_s(memory.copy_bytes_per_s)}."
    notes = (
        copied,
        *_known(free.note),
        *buffers.notes,
        *copies.notes,
        *device_matmul.notes,
        *host_matmul.notes,
    )
    return _Compute(device, host, copies, notes)


def _host_device(free_bytes: int, matmul: MatmulRates, read_bytes_per_s: float) -> Device:
    return Device(
        name="host",
        kind="host",
        memory_bytes=free_bytes,
        matmul_flops_per_s=matmul.flops_per_s,
        memory_bandwidth_bytes_per_s=read_bytes_per_s,
        identity=processor_name(),
    )


def _disk_device(folder: Path, disk: DiskRates) -> Device:
    return Device(
        name="disk",
        kind="disk",
        memory_bytes=free_disk(folder),
        memory_bandwidth_bytes_per_s=disk.read_bytes_per_s,
        identity=str(folder.resolve()),
    )


def _links(copies: TwoWayRates, disk: DiskRates) -> tuple[Link, ...]:
    return (
        _copy_link("host", "device", copies.to_device),
        _copy_link("device", "host", copies.from_device),
        Link(
            source="disk",
            target="host",
            bandwidth_bytes_per_s=disk.read_bytes_per_s,
            latency_s=disk.read_latency_s,
        ),
        Link(
            source="host",
            target="disk",
            bandwidth_bytes_per_s=disk.write_bytes_per_s,
            latency_s=disk.write_latency_s,
        ),
    )


def _copy_link(source: str, target: str, rates: CopyRates) -> Link:
    return Link(source=source, target=target, **rates._asdict())


def _default_disk_folder() -> Path:
    """The cache folder, made if need be; where it cannot be written, the folder for temporary files."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir())
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())


def _busy_notes(cores: int) -> tuple[str, ...]:
    """Asked before measuring, because measuring is a load as well."""
    load = os.getloadavg()[0]
    if load < cores / 2:
        return ()
    return (
        f"The machine was busy (load {load:.1f} on {cores} cores), so it looks slower than it is. "
        "Measure again when it is idle: capstan probe",
    )


def _thread_notes(cores: int, quota_note: str | None) -> tuple[str, ...]:
    import torch

    threads = torch.get_num_threads()
    if threads == cores:
        return _known(quota_note)
    return (
        *_known(quota_note),
        f"torch uses {threads} threads for {cores} cores; host rates are with those.",
    )


def _known(note: str | None) -> tuple[str, ...]:
    return () if note is None else (note,)


def cuda_name() -> str:
    """The product name of the current CUDA device."""
    import torch

    return torch.cuda.get_device_name()


def _versions() -> dict[str, str]:
    import torch

    versions = {
        "capstan": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    return versions | ({"cuda": torch.version.cuda} if torch.version.cuda else {})
