"""Ranks with unequally many batches, for test_uneven.py."""

import os
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from capstan.data_parallel import AsyncAverage, QAdam, wrap
from capstan.errors import CapstanError


def inputs_of(rank: int, step: int) -> torch.Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(100 * step + rank))


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 2))


def state_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([each.detach().float().reshape(-1) for each in model.state_dict().values()])


def counts(rank: int, epoch: int) -> int:
    """Batches of a rank: the first has more than the second, then fewer, then none."""
    return ((5, 3), (2, 4), (0, 2), (3, 3))[epoch][rank]


def epochs(rank: int, size: int, names: list[str]) -> dict[str, list[torch.Tensor]]:
    """The state after each of four epochs."""
    found = {}
    for name in names:
        model = normed()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trained: Any = (
            DistributedDataParallel(model)
            if name == "DDP"
            else wrap(model, optimizer, name, patience_s=20, bucket_bytes=300)
        )
        states = []
        for epoch in range(4):
            with trained.join():
                for step in range(counts(rank, epoch)):
                    optimizer.zero_grad()
                    trained(inputs_of(rank, 10 * epoch + step)).pow(2).mean().backward()
                    optimizer.step()
            states.append(state_of(model))
        if name != "DDP":
            trained.close()
        found[name] = states
    return found


def with_momentum(rank: int, size: int, names: list[str]) -> dict[str, list[torch.Tensor]]:
    """Weights and the optimizer's momenta, after two epochs of `zero_grad` at the end of a step."""
    found = {}
    for name in names:
        model = normed()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        with wrap(model, optimizer, name, patience_s=20, bucket_bytes=300) as trained:
            for epoch in range(2):
                with trained.join():
                    for step in range(counts(rank, epoch)):
                        with trained.no_sync():
                            trained(inputs_of(rank, 50 + step)).pow(2).mean().backward()
                        trained(inputs_of(rank, 10 * epoch + step)).pow(2).mean().backward()
                        optimizer.step()
                        optimizer.zero_grad()
            momenta = [each["exp_avg"].reshape(-1) for each in optimizer.state.values()]
        found[name] = [state_of(model), torch.cat(momenta)]
    return found


def lone(rank: int, size: int, arguments: Any) -> dict[str, list[torch.Tensor]]:
    """Weights of a rank without any batch, and of one with three, by an algorithm whose ranks differ."""
    found = {}
    for name in ("decentralized", "local_sgd"):
        torch.manual_seed(0)
        model = nn.Linear(4, 2, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seen = []
        with wrap(model, optimizer, name, patience_s=20) as trained, trained.join():
            for _ in range(3 if rank else 0):
                optimizer.zero_grad()
                trained(torch.ones(1, 4)).sum().backward()
                optimizer.step()
                seen.append(model.weight.detach().clone())
        found[name] = [*seen, model.weight.detach().clone()]
    return found


def refused(rank: int, size: int, arguments: Any) -> list[str]:
    """qadam, and ranks that do different things."""
    said = []
    model = normed()
    with wrap(model, QAdam(model.parameters()), "qadam", patience_s=20) as trained:
        try:
            with trained.join():
                pass
        except CapstanError as error:
            said.append(f"{type(error).__name__}: {error}")
    model = normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with wrap(model, optimizer, "bytegrad", patience_s=20) as trained:
        outputs = trained(inputs_of(rank, 0))
        try:
            with trained.join():
                if rank:
                    outputs.sum().backward()
                else:
                    trained(inputs_of(rank, 1))
        except CapstanError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def free(rank: int, size: int, arguments: Any) -> list[torch.Tensor]:
    """Averaging in the background, with three batches and with one; then the mean."""
    model = normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with wrap(model, optimizer, AsyncAverage(0.0), patience_s=20) as trained:
        with trained.join():
            for step in range(1 + 2 * rank):
                optimizer.zero_grad()
                trained(inputs_of(rank, step)).pow(2).mean().backward()
                optimizer.step()
        trained.average_weights()
    return [each.detach() for each in model.parameters()]


def lost(rank: int, size: int, arguments: Any) -> str:
    """A rank that ends the process inside while the other is through."""
    model = normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trained = wrap(model, optimizer, "bytegrad", patience_s=2)
    try:
        with trained.join():
            if rank:
                trained(inputs_of(rank, 0)).sum().backward()
                os._exit(3)
    except CapstanError as error:
        return f"{type(error).__name__}: {error}"
    return "ended"
