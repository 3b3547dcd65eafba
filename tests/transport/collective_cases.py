"""What ranks do for test_collectives.py; started by world.py."""

import os
import time
from typing import Any

import torch
import torch.distributed as dist

from capstan.codecs import Compressor, codec_from_name
from capstan.errors import CapstanError
from capstan.transport import Communicator, Shape
from capstan.transport.collectives import average, average_by_machine, average_by_ring, broadcast
from capstan.transport.group import Group
from world import stay


def values_of(rank: int, bucket: int, numel: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(100 * bucket + rank))


def averages(rank: int, size: int, arguments: Any) -> Any:
    """Every route and codec, several buckets at once; then each bucket's result and the ledger."""
    found: dict[str, Any] = {}
    group = Group(patience_s=30)
    for name in arguments["codecs"]:
        compressor = Compressor(codec_from_name(name), salt=rank)
        with Communicator(group) as communicator:
            buckets = [values_of(rank, at, numel) for at, numel in enumerate(arguments["sizes"])]
            waiting = [
                communicator.submit(
                    lambda talk, at=at, values=values, compressor=compressor: average(
                        talk, values, compressor=compressor, key=f"bucket {at}"
                    ),
                    about=f"bucket {at}",
                )
                for at, values in enumerate(buckets)
            ]
            for each in waiting:
                each.wait()
            found[name] = buckets
            found[f"{name} traffic"] = communicator.ledger.traffic.to_dict()
    machines = [list(range(at, min(at + 2, size))) for at in range(0, size, 2)]
    with Communicator(group) as communicator:
        for name in ("identity", "group8:512:float32"):
            values = values_of(rank, 0, 1000)
            compressor = Compressor(codec_from_name(name), salt=rank)
            communicator.submit(
                lambda talk, values=values, compressor=compressor: average_by_machine(
                    talk, values, compressor=compressor, key="a", machines=machines
                ),
                about="machines",
            ).wait()
            found[f"machines {name}"] = values
        values = values_of(rank, 0, 1000)
        communicator.submit(lambda talk: average_by_ring(talk, values), about="ring").wait()
        found["ring"] = values
        plain = values_of(rank, 0, 1000).mul_(1 / size)
        dist.all_reduce(plain)
        found["torch"] = plain
        told = values_of(rank, 0, 1000)
        communicator.submit(lambda talk: broadcast(talk, told), about="start").wait()
        found["broadcast"] = told
    return found


def shaped(rank: int, size: int, arguments: Any) -> Any:
    """An average over a slow link: its seconds."""
    shape = Shape(bandwidth_bytes_per_s=arguments["rate"], latency_s=arguments["latency"])
    with Communicator(Group(patience_s=30), shape=shape) as communicator:
        values = values_of(rank, 0, arguments["numel"])
        compressor = Compressor(codec_from_name("identity"))
        dist.barrier()
        start_s = time.monotonic()
        communicator.submit(
            lambda talk: average(talk, values, compressor=compressor, key="a"), about="a"
        ).wait()
        return time.monotonic() - start_s


def losing(rank: int, size: int, arguments: Any) -> str:
    """The last rank goes away or falls silent before the second bucket: what the others say."""
    with Communicator(Group(patience_s=2)) as communicator:
        compressor = Compressor(codec_from_name("identity"))
        for bucket in range(2):
            values = values_of(rank, bucket, 1000)
            if bucket == 1 and rank == size - 1:
                if arguments == "silent":
                    stay()
                os._exit(0)
            try:
                communicator.submit(
                    lambda talk, values=values, key=f"bucket {bucket}": average(
                        talk, values, compressor=compressor, key=key
                    ),
                    about=f"bucket {bucket}",
                ).wait()
            except CapstanError as error:
                return f"{type(error).__name__}: {error}"
    return "nothing"
