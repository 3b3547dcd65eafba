"""Slabs: memory of an exact size, handed out piece by piece.

torch's pinned allocator rounds every request up to a power of two, which costs 1.3-1.8 x the memory for
the layers of large models (FlexGen note, defect 12). A slab is one anonymous mapping of exactly the size
that the plan says, registered with CUDA where there is one, and its pieces are views.
"""

import mmap
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import torch

from capstan.errors import DeviceError, DoesNotFit
from capstan.hardware.free_memory import free_host_memory, usable_cores
from capstan.hardware.huge_pages import HUGE_PAGE_BYTES, prefer_huge_pages

# Pieces start at multiples of this, so that every dtype can view them and vector loads stay aligned.
ALIGNMENT = 64
_MOST_THREADS = 16  # so many clear memory as fast as it can be written


def aligned(size_bytes: int) -> int:
    """`size_bytes` rounded up to the alignment of pieces."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


class Slab:
    """Bytes on one device, handed out in order by `take`."""

    def __init__(self, name: str, size_bytes: int, *, device: torch.device, pinned: bool = False) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.used_bytes = 0
        self._pinned = False
        self._mapping: mmap.mmap | None = None
        if device.type != "cpu":
            self.bytes = _device_bytes(name, size_bytes, device)
        elif size_bytes == 0:
            self.bytes = torch.empty(0, dtype=torch.uint8)
        else:
            self._mapping = _host_mapping(name, size_bytes)
            self.bytes = torch.frombuffer(self._mapping, dtype=torch.uint8)
            if pinned and torch.cuda.is_available():
                self._pin()

    def _pin(self) -> None:
        assert self._mapping is not None
        try:
            _require_free(self.name, self.size_bytes)
            prefer_huge_pages(self._mapping)
            _make_resident(self.bytes)
            _register(self.name, self.bytes)
        except BaseException:
            self.close()
            raise
        self._pinned = True

    def take(self, size_bytes: int) -> torch.Tensor:
        """The next `size_bytes` bytes, as a flat uint8 view."""
        start, end = self.used_bytes, self.used_bytes + size_bytes
        if end > self.size_bytes:
            raise DoesNotFit(
                f"The slab {self.name!r} has {self.size_bytes:,} bytes, {self.used_bytes:,} in use; "
                f"{size_bytes:,} more do not fit. Grant more memory there, or place less."
            )
        self.used_bytes = min(aligned(end), self.size_bytes)
        return self.bytes[start:end]

    def close(self) -> None:
        """Give the memory back. Views handed out must no longer be used."""
        if self._pinned:
            _unregister(self.bytes)
            self._pinned = False
        if self._mapping is not None:
            # Now, and not when the last view of it is dropped, wherever that may lie.
            self._mapping.madvise(mmap.MADV_DONTNEED)
            self._mapping = None
        self.bytes = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _host_mapping(name: str, size_bytes: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise DoesNotFit(
            f"The host has no {size_bytes:,} bytes of memory left for {name!r}: {error.strerror}. "
            "Lower --host-memory, or end what else runs there."
        ) from error


def _require_free(name: str, size_bytes: int) -> None:
    """The system promises memory that it may not have, and kills who then touches all of it."""
    free_bytes = free_host_memory().value
    if size_bytes > free_bytes:
        raise DoesNotFit(
            f"The host has no {size_bytes:,} bytes of memory left for {name!r}: {free_bytes:,} are free. "
            "Lower --host-memory, or end what else runs there."
        )


def _make_resident(memory: torch.Tensor) -> None:
    """Touch every page, on all cores: CUDA would make the system find them one by one on one thread."""
    pages = memory.numpy()
    num_threads = min(usable_cores().value, _MOST_THREADS)
    share = -(-len(pages) // num_threads // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES

    def touch(start: int) -> None:
        pages[start : start + share : mmap.PAGESIZE] = 0  # numpy lets go of Python's lock meanwhile

    with ThreadPoolExecutor(num_threads) as threads:
        for _ in threads.map(touch, range(0, len(pages), share)):
            pass


def _device_bytes(name: str, size_bytes: int, device: torch.device) -> torch.Tensor:
    try:
        return torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            f"{device} has no {size_bytes:,} bytes left for {name!r}. "
            "Lower --device-memory, or end what else runs there."
        ) from error


def _register(name: str, tensor: torch.Tensor) -> None:
    status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel(), 0)
    if int(status) != 0:
        raise DeviceError(
            f"CUDA could not pin the {tensor.numel():,} bytes of {name!r} (status {int(status)}). "
            "Raise the limit on locked memory (ulimit -l), or grant less host memory."
        )


def _unregister(tensor: torch.Tensor) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
