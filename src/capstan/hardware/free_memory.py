"""How many bytes are free now in each tier, and how many cores may be used.

In a container the machine's own figures are too large: the control group's limits count. Both versions
of control groups are read from their files, below a root that tests can replace.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")
# Where version 1 (or 2) mounts the controllers, and the same beside version 1 on hybrid systems.
V2_MOUNTS = ("sys/fs/cgroup", "sys/fs/cgroup/unified")


class Amount(NamedTuple):
    """What may be used, and a note when a limit makes it less than the machine has."""

    value: int
    note: str | None


def free_host_memory(root: Path = ROOT) -> Amount:
    """Bytes that a new allocation can take: the machine's available memory or the container's rest."""
    available = _available_memory(root)
    rest = min(_memory_rests(root), default=available)
    if rest >= available:
        return Amount(available, None)
    note = (
        f"A container limit leaves {rest / 2**30:.2f} GiB of host memory; "
        f"the machine itself has {available / 2**30:.2f} GiB available."
    )
    return Amount(rest, note)


def usable_cores(root: Path = ROOT) -> Amount:
    """Cores this process may run on, rounded up where a container's quota is a fraction."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min(_cpu_quotas(root), default=float(cores))
    if quota >= cores:
        return Amount(cores, None)
    note = f"A container quota of {quota:g} cores is below the {cores} cores that are visible."
    return Amount(max(1, -int(-quota // 1)), note)


def free_disk(folder: Path) -> int:
    """Bytes that this user may still write in `folder`."""
    return shutil.disk_usage(folder).free


def free_cuda_memory() -> int:
    """Bytes that the current CUDA device still has, other processes' use taken away."""
    import torch

    return int(torch.cuda.mem_get_info()[0])


def _available_memory(root: Path) -> int:
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    import psutil

    return int(psutil.virtual_memory().available)


def _memory_rests(root: Path) -> Iterator[int]:
    """What each limit above this process leaves. File cache that is not in use counts as free."""
    for group in _groups(root, ""):
        yield from _rest(group, "memory.max", "memory.current", "inactive_file")
    for group in _groups(root, "memory"):
        yield from _rest(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _rest(group: Path, limit_file: str, used_file: str, cache_key: str) -> Iterator[int]:
    limit = _number(group / limit_file)
    if limit is not None:
        used = (_number(group / used_file) or 0) - _statistic(group / "memory.stat", cache_key)
        yield max(0, limit - max(0, used))


def _cpu_quotas(root: Path) -> Iterator[float]:
    for group in _groups(root, ""):
        words = _read(group / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            yield int(words[0]) / int(words[1])
    for group in _groups(root, "cpu"):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota is not None and quota > 0 and period:
            yield quota / period


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of all above it; "" is version 2.

    Inside a container the path of the group often does not exist, and its limits lie at the top.
    """
    mounts = [f"sys/fs/cgroup/{controller}"] if controller else V2_MOUNTS
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            for mount in mounts:
                group = root / mount / path.lstrip("/")
                while group != root / mount:
                    yield group
                    group = group.parent
                yield root / mount


def _statistic(path: Path, key: str) -> int:
    for line in _read(path).splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == key:
            return int(words[1])
    return 0


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    # "max" means no limit.
    return int(text) if text.lstrip("-").isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
