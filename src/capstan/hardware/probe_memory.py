"""How fast host memory is read and copied, and how fast a device reads its own memory."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from capstan.hardware.processor import last_level_cache_bytes
from capstan.hardware.time_slice import TimeSlice, median_seconds

if TYPE_CHECKING:
    import torch

MIB = 2**20
LARGEST_BUFFER_BYTES = 4096 * MIB
SMALLEST_BUFFER_BYTES = 4 * MIB
TIMES_THE_CACHE = 4
# Virtual machines whose host hands out memory page by page were seen to touch 0.4 GiB each second.
TOUCHED_BYTES_PER_S = 512 * MIB
SHARE_TO_TOUCH = 1 / 6
TINY_BYTES = 64


class CopyRates(NamedTuple):
    """What one direction of a link does."""

    bandwidth_bytes_per_s: float
    latency_s: float
    pageable_bandwidth_bytes_per_s: float | None
    duplex_bandwidth_bytes_per_s: float | None


class TwoWayRates(NamedTuple):
    """Both directions of the link between host and device, and what was noticed on the way."""

    to_device: CopyRates
    from_device: CopyRates
    notes: tuple[str, ...]


class HostRates(NamedTuple):
    """How fast host memory is read, and copied to other host memory."""

    read_bytes_per_s: float
    copy_bytes_per_s: float


class HostBuffers(NamedTuple):
    """Two equal pieces of host memory whose pages were all touched, and what to know about them."""

    first: "torch.Tensor"
    second: "torch.Tensor"
    notes: tuple[str, ...]


def host_buffers(free_bytes: int, budget_s: float) -> HostBuffers:
    """Buffers so large that memory is measured and not a cache, if free memory and time allow it.

    They are made once and shared, because touching fresh memory can be 100 times slower than using it.
    """
    cache = last_level_cache_bytes()
    size = _buffer_bytes(cache, free_bytes, budget_s)
    notes = () if size >= 2 * cache else (_too_small(size, cache),)
    return HostBuffers(host_buffer(size), host_buffer(size), notes)


def _buffer_bytes(cache_bytes: int, free_bytes: int, budget_s: float) -> int:
    touched_in_time = int(budget_s * SHARE_TO_TOUCH * TOUCHED_BYTES_PER_S)
    size = min(TIMES_THE_CACHE * cache_bytes, LARGEST_BUFFER_BYTES, free_bytes // 16, touched_in_time // 2)
    return max(SMALLEST_BUFFER_BYTES, size // MIB * MIB)


def _too_small(size_bytes: int, cache_bytes: int) -> str:
    return (
        f"Host memory was measured in buffers of {size_bytes // MIB} MiB beside caches of "
        f"{cache_bytes // MIB} MiB, so it may look faster than it is. Measure for longer."
    )


def host_buffer(size_bytes: int) -> "torch.Tensor":
    """Host memory whose every page has been touched."""
    import torch

    return torch.ones(size_bytes // 4, dtype=torch.float32, device="cpu")


def read_rate(buffer: "torch.Tensor", time_slice: TimeSlice) -> float:
    """Bytes each second that a sum over the buffer reads, on all of torch's threads."""

    def read() -> float:
        # item() waits for the sum, on an accelerator too.
        return float(buffer.sum().item())

    return buffer.nbytes / median_seconds(read, time_slice)


def copy_rate(target: "torch.Tensor", source: "torch.Tensor", time_slice: TimeSlice) -> float:
    """Bytes copied each second; each byte is read once and written once but counted once."""
    return source.nbytes / median_seconds(lambda: target.copy_(source), time_slice)


def host_rates(buffers: HostBuffers, time_slice: TimeSlice) -> HostRates:
    """Reading and copying, each for half of the slice."""
    return HostRates(
        read_bytes_per_s=read_rate(buffers.first, time_slice.part(0.5)),
        copy_bytes_per_s=copy_rate(buffers.second, buffers.first, time_slice.part(0.5)),
    )


def host_copies(buffers: HostBuffers, time_slice: TimeSlice) -> TwoWayRates:
    """Host memory in both roles: the "device" is the second buffer.

    Pinned and pageable memory do not differ here, so the pageable rate stays None.
    """
    host, device, _ = buffers
    to_device = copy_rate(device, host, time_slice.part(0.3))
    from_device = copy_rate(host, device, time_slice.part(0.3))
    half = len(host) // 2
    both = duplex_rates(
        lambda: device[:half].copy_(host[:half]),
        lambda: host[half:].copy_(device[half:]),
        size_bytes=host[:half].nbytes,
        seconds=time_slice.part(0.3).left(),
    )
    tiny = tiny_copy_seconds()
    return TwoWayRates(
        CopyRates(to_device, tiny, None, both[0]), CopyRates(from_device, tiny, None, both[1]), ()
    )


def duplex_rates(
    first: Callable[[], object], second: Callable[[], object], *, size_bytes: int, seconds: float
) -> tuple[float, float]:
    """The rate of each of two copies of `size_bytes`, repeated side by side for that long."""
    start_together = threading.Barrier(2)

    def rate(copy: Callable[[], object]) -> float:
        copy()
        start_together.wait(timeout=60)
        timer = TimeSlice(seconds)
        num_copies = 0
        while num_copies < 2 or timer.left():
            copy()
            num_copies += 1
        return num_copies * size_bytes / timer.spent()

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.submit(rate, first), pool.submit(rate, second)
        return one.result(), other.result()


def tiny_copy_seconds() -> float:
    """The fixed cost of one copy between host buffers, almost all of it the call itself."""
    source, target = host_buffer(TINY_BYTES), host_buffer(TINY_BYTES)
    return median_seconds(lambda: target.copy_(source), TimeSlice(0.01), at_least=50, at_most=1000)
