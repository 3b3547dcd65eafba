"""How fast is the network between the ranks, and how fast do they encode?"""

import time
from collections.abc import Callable
from functools import partial

import torch

from capstan.codecs import Compressor, codec_from_name
from capstan.data_parallel.asynchronous import agreement
from capstan.data_parallel.planner import Coding, Network
from capstan.transport import Communicator, Conversation, Group, Operation

_ROUNDS = 8
_PROBE_BYTES = 4 * 2**20
_PROBE_ELEMENTS = 2**19


def probe_network(group: Group, *, size_bytes: int = _PROBE_BYTES) -> Network:
    """Latency of a small exchange and rate of a large one, when all ranks talk to all; all must call it.

    The slowest rank's figures count, since every exchange waits for it.
    """
    with Communicator(group) as communicator:

        def timed(operation: partial[Operation]) -> float:
            group.gather(None)  # together
            start_s = time.perf_counter()
            communicator.submit(operation, about="the probe").wait()
            return time.perf_counter() - start_s

        small_s = min(timed(partial(agreement, own=True, answers=[])) for _ in range(_ROUNDS))
        timed(partial(_exchange, size_bytes=size_bytes))  # connections get up to speed
        large_s = min(timed(partial(_exchange, size_bytes=size_bytes)) for _ in range(2))
    slowest_small_s = max(group.gather(small_s))
    slowest_large_s = max(group.gather(large_s))
    sent = (group.size - 1) * size_bytes
    # Nobody sends before it has heard that the other listens, so a first exchange takes two latencies.
    return Network(
        num_ranks=group.size,
        bandwidth_bytes_per_s=sent / max(slowest_large_s - slowest_small_s, 1e-9),
        latency_s=slowest_small_s / 2,
    )


def probe_coding(group: Group, codec: str, *, num_elements: int = _PROBE_ELEMENTS) -> Coding:
    """Seconds to encode one element and to decode one, while all ranks do; all must call it."""
    compressor = Compressor(codec_from_name(codec))
    values, out = torch.randn(num_elements), torch.empty(num_elements)
    payload = torch.empty(compressor.size(values), dtype=torch.uint8)

    def seconds_of(work: Callable[[], None]) -> float:
        work()
        group.gather(None)  # together: ranks may share a processor
        start_s = time.perf_counter()
        for _ in range(3):
            work()
        return float(max(group.gather((time.perf_counter() - start_s) / 3))) / num_elements

    return Coding(
        seconds_of(lambda: compressor.encode(values, payload, key="probe")),
        seconds_of(lambda: compressor.decode(payload, out)),
    )


def _exchange(talk: Conversation, size_bytes: int) -> Operation:
    """The same to and from everybody."""
    large, others = talk.round("probe"), [rank for rank in range(talk.size) if rank != talk.rank]
    for rank in others:
        large.to(rank, size_bytes)
        large.take(rank, size_bytes)
    yield large
