"""What the system tells about the processor: its name and how much its last-level caches hold."""

import platform
from pathlib import Path

# Assumed where the system does not tell: more than most processors have.
UNTOLD_CACHE_BYTES = 64 * 2**20
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def processor_name(root: Path = Path("/")) -> str:
    """The model's name, empty where the system does not tell."""
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def last_level_cache_bytes(root: Path = Path("/")) -> int:
    """All caches of the third level together; each is counted once, however many cores share it."""
    caches = {
        folder.joinpath("shared_cpu_list").read_text(): folder.joinpath("size").read_text().strip()
        for folder in root.glob("sys/devices/system/cpu/cpu[0-9]*/cache/index3")
    }
    sizes = [int(size[:-1]) * UNITS[size[-1]] for size in caches.values() if size[-1:] in UNITS]
    return sum(sizes) or UNTOLD_CACHE_BYTES
