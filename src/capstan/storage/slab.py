"""Slabs: memory of an exact size, handed out piece by piece.

torch's pinned allocator rounds every request up to a power of two, which costs 1.3-1.8 x the memory for
the layers of large models (FlexGen note, defect 12). A slab is one anonymous mapping of exactly the size
that the plan says, registered with CUDA where there is one, and its pieces are views.
"""

import mmap
from typing import Self

import torch

from capstan.errors import DeviceError, DoesNotFit

# Pieces start at multiples of this, so that every dtype can view them and vector loads stay aligned.
ALIGNMENT = 64


def aligned(size_bytes: int) -> int:
    """`size_bytes` rounded up to the alignment of pieces."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


class Slab:
    """Bytes on one device, handed out in order by `take`."""

    def __init__(self, name: str, size_bytes: int, *, device: torch.device, pinned: bool = False) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.used_bytes = 0
        self._pinned = pinned and size_bytes > 0 and torch.cuda.is_available()
        self.bytes = (
            _host_bytes(name, size_bytes) if device.type == "cpu" else _device_bytes(name, size_bytes, device)
        )
        if self._pinned:
            _register(name, self.bytes)

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
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())
            self._pinned = False
        self.bytes = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _host_bytes(name: str, size_bytes: int) -> torch.Tensor:
    if size_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    try:
        mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise DoesNotFit(
            f"The host has no {size_bytes:,} bytes of memory left for {name!r}: {error.strerror}. "
            "Lower --host-memory, or end what else runs there."
        ) from error
    return torch.frombuffer(mapping, dtype=torch.uint8)


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
