"""How fast bytes cross between host memory and a CUDA device: each way, both at once, pinned or not."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from capstan.hardware.probe_memory import CopyRates, HostBuffers, TwoWayRates, read_rate
from capstan.hardware.time_slice import TimeSlice, median_measure, median_seconds

if TYPE_CHECKING:
    import torch

TINY_ELEMENTS = 16
LARGEST_COPY_BYTES = 256 * 2**20
PINNING_REFUSED = (
    "The driver refused to pin host memory: rates between host and device are those of pageable memory."
)


class Pair(NamedTuple):
    """A copy waiting to be made on a stream of its own."""

    target: "torch.Tensor"
    source: "torch.Tensor"
    stream: "torch.cuda.Stream"


def cuda_read_rate(free_cuda_bytes: int, time_slice: TimeSlice) -> float:
    """Bytes each second that a sum reads from the device's own memory."""
    import torch

    # So large that the time to start the sum and to hear of its end hardly counts.
    size = min(2**32, free_cuda_bytes // 8) // 4 * 4
    return read_rate(torch.ones(size // 4, dtype=torch.float32, device="cuda"), time_slice)


def cuda_copies(buffers: HostBuffers, free_cuda_bytes: int, time_slice: TimeSlice) -> TwoWayRates:
    """Copies each way from pageable memory, then pinned, then both ways at once."""
    import torch

    # Both directions together take at most an eighth of the device.
    num_elements = min(LARGEST_COPY_BYTES, free_cuda_bytes // 16) // 4
    sent, received = buffers.first[:num_elements], buffers.second[:num_elements]
    to_device = Pair(torch.empty_like(sent, device="cuda"), sent, torch.cuda.Stream())
    from_device = Pair(received, torch.ones_like(received, device="cuda"), torch.cuda.Stream())
    torch.cuda.synchronize()  # the buffers are made on another stream than those that copy

    pageable = (_rate(to_device, time_slice.part(0.15)), _rate(from_device, time_slice.part(0.15)))
    with pinned(sent) as first, pinned(received) as second:
        single = (_rate(to_device, time_slice.part(0.2)), _rate(from_device, time_slice.part(0.2)))
        rounds = max(2, int(time_slice.left() / 4 * single[0] / sent.nbytes))
        # From pageable memory the driver copies in steps that hold up the caller: nothing would overlap.
        duplex = _duplex_rates(to_device, from_device, rounds) if first and second else (None, None)
        tiny = (_tiny_seconds(to_device), _tiny_seconds(from_device))
    return TwoWayRates(
        to_device=CopyRates(single[0], tiny[0], pageable[0], duplex[0]),
        from_device=CopyRates(single[1], tiny[1], pageable[1], duplex[1]),
        notes=() if first and second else (PINNING_REFUSED,),
    )


@contextmanager
def pinned(buffer: "torch.Tensor") -> Iterator[bool]:
    """Pin exactly this buffer's pages for the duration; False where the driver refuses.

    Not `pin_memory()`: its allocator rounds sizes up to a power of two and keeps what it pinned.
    """
    import torch

    runtime = torch.cuda.cudart()
    done = int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)) == 0
    if not done:
        # CUDA remembers the refusal and reports it at the next kernel; let a kernel of no use take it.
        with suppress(RuntimeError):
            torch.ones(1, device="cuda")
    try:
        yield done
    finally:
        if done:
            torch.cuda.synchronize()
            runtime.cudaHostUnregister(buffer.data_ptr())


def _rate(pair: Pair, time_slice: TimeSlice) -> float:
    """Bytes each second between two events around one copy on its stream."""
    return pair.source.nbytes / median_measure(lambda: _elapsed([pair], 1)[0], time_slice)


def _duplex_rates(first: Pair, second: Pair, rounds: int) -> tuple[float, float]:
    """The rate of each direction while both run. The slower one ends alone, so its rate flatters a little."""
    _elapsed([first, second], 1)
    seconds = _elapsed([first, second], rounds)
    return rounds * first.source.nbytes / seconds[0], rounds * second.source.nbytes / seconds[1]


def _elapsed(pairs: list[Pair], rounds: int) -> list[float]:
    """Make every copy `rounds` times, all streams at once; the seconds each stream took."""
    import torch

    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in pairs]
    for pair, (start, _) in zip(pairs, events, strict=True):
        start.record(pair.stream)
    for _ in range(rounds):
        for pair in pairs:
            with torch.cuda.stream(pair.stream):
                pair.target.copy_(pair.source, non_blocking=True)
    for pair, (_, end) in zip(pairs, events, strict=True):
        end.record(pair.stream)
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _tiny_seconds(pair: Pair) -> float:
    """From the call of one tiny copy until the host knows that it is done."""
    import torch

    target, source = pair.target[:TINY_ELEMENTS], pair.source[:TINY_ELEMENTS]

    def copy_and_wait() -> None:
        with torch.cuda.stream(pair.stream):
            target.copy_(source, non_blocking=True)
        pair.stream.synchronize()

    return median_seconds(copy_and_wait, TimeSlice(0.02), at_least=50, at_most=1000)
