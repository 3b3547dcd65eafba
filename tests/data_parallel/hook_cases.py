"""What ranks do with a DDP hook, for test_hooks.py."""

import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from capstan.data_parallel import HookState, OneBit, hook, wrap


def resumed(rank: int, size: int, arguments: Any) -> dict[str, list[list[float]]]:
    """The gradients of three steps after two, in one run and in one that was interrupted between them."""

    def hooked(name: str) -> tuple[DistributedDataParallel, HookState]:
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Linear(40, 40))
        state = HookState(name, patience_s=20)
        model.register_comm_hook(state, hook)
        return model, state

    def steps(model: nn.Module, numbers: range) -> list[float]:
        sums = []
        for step in numbers:
            model.zero_grad()
            inputs = torch.randn(4, 40, generator=torch.Generator().manual_seed(7 * step + rank))
            model(inputs).square().mean().backward()
            sums.append(float(sum(each.grad.double().abs().sum() for each in model.parameters())))
        return sums

    found = {}
    for name in arguments:
        model, state = hooked(name)
        # DDP cuts its buckets anew in its second step, and one that starts again does so too.
        steps(model, range(4))
        kept = state.state_dict()
        whole = steps(model, range(4, 7))
        state.close()
        model, state = hooked(name)
        steps(model, range(2))
        state.load_state_dict(kept)
        found[name] = [whole, steps(model, range(4, 7))]
        state.close()
    return found


def by_machine(rank: int, size: int, arguments: Any) -> dict[str, int]:
    """Bytes that cross between two machines of two ranks each in a step, through a hook and through wrap."""
    socket.gethostname = lambda: f"host{rank // 2}"  # type: ignore[method-assign]
    elements = 10_000

    def step(model: nn.Module) -> None:
        model(torch.randn(2, elements)).sum().backward()

    def crossing(ledger: Any) -> int:
        between = {f"rank {a}->rank {b}" for a in range(size) for b in range(size) if a // 2 != b // 2}
        return sum(ledger.traffic.on(link) for link in between)

    hooked = DistributedDataParallel(nn.Linear(elements, 1, bias=False))
    state = HookState(OneBit(route="machines"), patience_s=20)
    hooked.register_comm_hook(state, hook)
    step(hooked)
    model = nn.Linear(elements, 1, bias=False)
    replica = wrap(
        model, torch.optim.SGD(model.parameters(), lr=0.1), OneBit(route="machines"), patience_s=20
    )
    before = crossing(replica.ledger)
    step(replica)
    found = {"hook": crossing(state.ledger), "wrap": crossing(replica.ledger) - before}
    dist.barrier()
    state.close()
    replica.close()
    return found
