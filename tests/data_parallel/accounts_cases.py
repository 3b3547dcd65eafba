"""What training cost, planned and measured, for test_accounts.py."""

from typing import Any

import torch
from torch import nn

from capstan.data_parallel import (
    Decentralised,
    DiLoCo,
    GradientAllReduce,
    LocalSGD,
    OneBit,
    QAdam,
    QAdamMomenta,
    wrap,
)
from capstan.data_parallel.names import ALGORITHMS, algorithm_from_name
from capstan.data_parallel.planner import Network

STEPS = 7
MAKERS: dict[str, Any] = {
    "ring": lambda: GradientAllReduce(route="ring"),
    "machines": lambda: OneBit(route="machines", machines=[[0, 1], [2]]),
    "one machine": lambda: OneBit(route="machines", machines=[[0, 1, 2]]),
    "all": lambda: Decentralised("all", every=2),
    "every 3": lambda: Decentralised(every=3),
    "local 2": lambda: LocalSGD(2, codec="sign:64", error_feedback=True),
    "diloco 3": lambda: DiLoCo(3),
    "qadam 8": lambda: QAdamMomenta(8),
}
NAMES = [*(name for name in ALGORITHMS if name != "async"), *MAKERS]


def inputs_of(rank: int, step: int) -> torch.Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(100 * step + rank))


def model_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 31), nn.BatchNorm1d(31), nn.Tanh(), nn.Linear(31, 17), nn.Linear(17, 2)
    ).to(dtype)


def accounts(rank: int, size: int, names: list[str]) -> dict[str, list[Any]]:
    """Plan and trace of seven steps, by algorithm; in bfloat16 of as many with two backward passes each."""
    found = {}
    network = Network(num_ranks=size, bandwidth_bytes_per_s=1e6, latency_s=1e-3)
    for dtype in (getattr(torch, name) for name in names):
        for name in NAMES:
            model = model_of(dtype)
            is_qadam = name.startswith("qadam")
            optimizer = (
                QAdam(model.parameters(), warmup_steps=3)
                if is_qadam
                else torch.optim.SGD(model.parameters(), lr=0.1)
            )
            made = MAKERS[name]() if name in MAKERS else algorithm_from_name(name)
            with wrap(model, optimizer, made, patience_s=20, bucket_bytes=1000) as trained:
                for step in range(STEPS):
                    optimizer.zero_grad()
                    for part in range(2 if dtype == torch.bfloat16 else 1):
                        trained(inputs_of(rank, 10 * step + part).to(dtype)).pow(2).mean().backward()
                    optimizer.step()
                passes = STEPS * (2 if dtype == torch.bfloat16 else 1)
                plan = trained.plan(STEPS, network=network, compute_s=0.1, passes=passes)
                found[f"{name} {dtype}"] = [plan.to_dict(), trained.trace().to_dict()]
    return found


def resumed(rank: int, size: int, arguments: Any) -> list[Any]:
    """Plan and trace of two steps that go on where a state was taken: the second of them exchanges."""
    network = Network(num_ranks=size, bandwidth_bytes_per_s=1e6, latency_s=1e-3)
    state, accounts = None, []
    for _ in range(2):
        model = model_of(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with wrap(model, optimizer, LocalSGD(5), patience_s=20) as trained:
            if state is not None:
                trained.load_algorithm_state(state)
            for step in range(3):
                trained(inputs_of(rank, step)).sum().backward()
                optimizer.step()
            state = trained.algorithm_state()
            plan = trained.plan(3, network=network, compute_s=0.1)
            accounts.append([plan.to_dict(), trained.trace().to_dict()])
    return accounts
