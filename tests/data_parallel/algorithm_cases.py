"""What ranks do for test_algorithms.py: a small model, ten steps, the weights of every step."""

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from capstan.data_parallel import (
    QAdam,
    algorithm_from_name,
    ddp_hooks,
    hook,
    wrap,
)
from capstan.data_parallel.centralised import Centralised
from capstan.data_parallel.decentralised import Decentralised
from capstan.data_parallel.local_sgd import LocalSGD
from capstan.data_parallel.powersgd import PowerSGD
from capstan.data_parallel.qadam import QAdamMomenta

STEPS = 10
BUCKET_BYTES = 600  # several buckets
MAKERS: dict[str, Any] = {
    "identity ring": lambda: Centralised(route="ring"),
    "powersgd 2": lambda: PowerSGD(rank=2),
    "decentralized all": lambda: Decentralised("all"),
    "decentralized every 2": lambda: Decentralised(every=2),
    "local_sgd 1": lambda: LocalSGD(1),
    "local_sgd 3": lambda: LocalSGD(3),
    "diloco 2": lambda: LocalSGD(
        2, lr=0.7, momentum=0.9, nesterov=True, codec="group8:512:float32", error_feedback=True
    ),
    "qadam 8": lambda: QAdamMomenta(8),
    "qadam long": QAdamMomenta,
}


def make_model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    inputs = torch.randn(8, 6, generator=generator)
    return inputs, inputs[:, :3].sin()


def make_optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    if name.startswith("qadam"):
        return QAdam(parameters, lr=0.01, warmup_steps=1000 if name.endswith("long") else 4)
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.5)


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([each.detach().reshape(-1) for each in model.parameters()]).clone()


def train(rank: int, size: int, name: str) -> dict[str, Any]:
    model = make_model()
    optimizer = make_optimizer(name, model.parameters())
    algorithm = MAKERS[name]() if name in MAKERS else algorithm_from_name(name)
    with wrap(model, optimizer, algorithm, bucket_bytes=BUCKET_BYTES, patience_s=30) as replica:
        seen = []
        for step in range(STEPS):
            inputs, targets = batch(rank, step)
            optimizer.zero_grad()
            (replica(inputs) - targets).pow(2).mean().backward()
            optimizer.step()
            seen.append(weights_of(model))
        state = replica.algorithm_state()
        order = state["order"]
        replicas = {end: state["state"].get(end, {}).get("held") for end in ("own", "left", "right")}
        num_buckets = len(replica.gradient_buckets())
    return {"weights": torch.stack(seen), "order": order, "replicas": replicas, "buckets": num_buckets}


def train_all(rank: int, size: int, names: list[str]) -> dict[str, Any]:
    return {name: train(rank, size, name) for name in names}


def train_ddp(rank: int, size: int, names: list[str]) -> dict[str, Any]:
    """DDP itself ("plain"), and with our hooks."""
    found = {}
    for name in names:
        model = make_model()
        ddp = DistributedDataParallel(model, bucket_cap_mb=0.0005)
        state = None
        if name != "plain":
            algorithm = MAKERS[name]() if name in MAKERS else algorithm_from_name(name)
            state = ddp_hooks.HookState(algorithm, patience_s=30)
            ddp.register_comm_hook(state, hook)
        optimizer = make_optimizer(name, model.parameters())
        seen = []
        for step in range(STEPS):
            inputs, targets = batch(rank, step)
            optimizer.zero_grad()
            (ddp(inputs) - targets).pow(2).mean().backward()
            optimizer.step()
            seen.append(weights_of(model))
        found[name] = torch.stack(seen)
        if state is not None:
            state.close()
    return found
