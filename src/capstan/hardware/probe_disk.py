"""How fast a disk is read and written in sequence, and how long it takes to answer one small request."""

from pathlib import Path
from random import Random
from typing import NamedTuple

from capstan.errors import DeviceError
from capstan.hardware.direct_io import BLOCK_BYTES, NUM_REQUESTS, SECTOR_BYTES, UnnamedFile, unnamed_file
from capstan.hardware.free_memory import free_disk
from capstan.hardware.time_slice import (
    Sample,
    TimeSlice,
    growing_samples,
    median_at_each_size,
    median_measure,
)
from capstan.hardware.units import gib

SMALLEST_FILE_BYTES = 4 * BLOCK_BYTES
LARGEST_FILE_BYTES = 512 * BLOCK_BYTES
# A probe must not be what fills a disk: it takes at most this share of what is free.
SHARE_OF_FREE = 0.25
# Twice the work, with a margin, because a disk that filled its own write cache slows down.
GROWTH = 3.0
# These file systems hold their files in memory, so a rate measured there is no disk's.
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")


class DiskRates(NamedTuple):
    """What the disk under one folder does, and how it was measured."""

    read_bytes_per_s: float
    write_bytes_per_s: float
    read_latency_s: float
    write_latency_s: float
    notes: tuple[str, ...]


def disk_rates(folder: Path, time_slice: TimeSlice, *, seed: int = 0) -> DiskRates:
    """Sequential rates at growing sizes, and the median time of one sector at a random place."""
    largest = _largest_file(folder)
    with unnamed_file(folder) as file:
        written, write_rate = _write_rate(file, largest, time_slice.part(0.45))
        read_rate = _read_rate(file, written, time_slice.part(0.4))
        places = Random(seed)
        read_latency = _sector_seconds(file, written, places, time_slice.part(0.05), is_write=False)
        write_latency = _sector_seconds(file, written, places, time_slice.part(0.05), is_write=True)
        return DiskRates(read_rate, write_rate, read_latency, write_latency, _notes(folder, file, written))


def _largest_file(folder: Path) -> int:
    try:
        free = free_disk(folder)
    except OSError as error:
        raise DeviceError(
            f"The disk probe cannot look at {folder} ({error.strerror}). "
            "Name a folder that exists: --disk FOLDER or disk_dir=…"
        ) from error
    largest = min(LARGEST_FILE_BYTES, int(free * SHARE_OF_FREE)) // BLOCK_BYTES * BLOCK_BYTES
    if largest < SMALLEST_FILE_BYTES:
        raise DeviceError(
            f"The disk probe needs 4 MiB and takes at most {SHARE_OF_FREE:.0%} of what is free, "
            f"but {folder} has {gib(free)} free. Free some space or name another folder: --disk FOLDER."
        )
    return largest


def _write_rate(file: UnnamedFile, largest: int, time_slice: TimeSlice) -> tuple[int, float]:
    """The largest size that was written in the time, and the rate at that size.

    Not the best rate of all sizes: a small file may end in the disk's own write cache.
    """
    samples = growing_samples(
        lambda size: time_slice.seconds_of(lambda: file.write(size)),
        _doubled_up_to(largest),
        time_slice,
        growth=GROWTH,
    )
    return _rate_at_largest(samples)


def _read_rate(file: UnnamedFile, written: int, time_slice: TimeSlice) -> float:
    """Reads grow like writes, because a disk may take writes in far faster than it reads them back."""

    def read(size: int) -> float:
        file.forget()
        return time_slice.seconds_of(lambda: file.read(size))

    samples = growing_samples(read, _doubled_up_to(written), time_slice, growth=GROWTH)
    return _rate_at_largest(samples)[1]


def _doubled_up_to(largest: int) -> list[int]:
    sizes = [SMALLEST_FILE_BYTES]
    while sizes[-1] * 2 <= largest:
        sizes.append(sizes[-1] * 2)
    return sizes


def _rate_at_largest(samples: list[Sample]) -> tuple[int, float]:
    medians = median_at_each_size(samples)
    size = max(medians)
    return size, size / medians[size]


def _sector_seconds(
    file: UnnamedFile, written: int, places: Random, time_slice: TimeSlice, *, is_write: bool
) -> float:
    def touch() -> float:
        offset = places.randrange(written // SECTOR_BYTES) * SECTOR_BYTES
        file.forget()
        act = file.write_sector if is_write else file.read_sector
        return time_slice.seconds_of(lambda: act(offset))

    return median_measure(touch, time_slice, at_most=500)


def _notes(folder: Path, file: UnnamedFile, written: int) -> tuple[str, ...]:
    file_system = file_system_of(folder)
    how = "direct I/O" if file.is_direct else "buffered I/O, flushed and dropped from the page cache"
    notes = [
        f"Disk measured in {folder} ({file_system}) with {how}, {NUM_REQUESTS} requests of 1 MiB in flight, "
        f"{written // BLOCK_BYTES} MiB long."
    ]
    if not file.is_direct:
        notes.append(f"{folder} refuses direct I/O, so part of the disk's rates may be the page cache's.")
    if file_system in MEMORY_FILE_SYSTEMS:
        notes.append(
            f"{folder} lies in memory, so its rates are no disk's: name a folder on a disk with --disk."
        )
    return tuple(notes)


def file_system_of(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The kind of file system that `folder` lies on, "unknown" where the system does not tell."""
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return "unknown"
    resolved = folder.resolve()
    # The last of equal mount points covers the earlier ones.
    around = [
        (len(words[1]), i, words[2]) for i, words in enumerate(lines) if resolved.is_relative_to(words[1])
    ]
    return max(around)[2] if around else "unknown"
