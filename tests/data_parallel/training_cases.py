"""Training runs for test_training.py; started by world.py."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from capstan.data_parallel import AsyncAverage, QAdam, algorithm_from_name, load_latest, save_checkpoint, wrap
from capstan.data_parallel.replica import Replica
from capstan.errors import CapstanError
from world import stay, stop


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 2))


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "qadam":
        return QAdam(model.parameters(), lr=0.01, warmup_steps=3)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def loss_of(model: nn.Module, rank: int, step: int) -> torch.Tensor:
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(100 * step + rank))
    return (model(inputs) - inputs[:, :2].cos()).pow(2).mean()


def one_step(replica: Replica, rank: int, step: int) -> float:
    replica.optimizer.zero_grad()
    loss = loss_of(replica, rank, step)
    loss.backward()
    replica.optimizer.step()
    return loss.item()


def interrupted(rank: int, size: int, arguments: Any) -> dict[str, list[list[float]]]:
    """Losses of ten steps in one go, and of five steps, a checkpoint, a new model, and five more."""
    found = {}
    for name in arguments["names"]:
        losses: list[list[float]] = [[], []]
        for run, legs in enumerate(([(0, 10)], [(0, 5), (5, 10)])):
            for first, last in legs:
                model = make_model()
                folder = Path(arguments["folder"]) / f"{name}-{run}"
                with wrap(
                    model, make_optimizer(name, model), algorithm_from_name(name), bucket_bytes=900
                ) as replica:
                    loaded = load_latest(folder, replica)
                    assert (loaded is None) == (first == 0)
                    if loaded is not None:
                        assert loaded == (5, {"note": "halfway"})
                    losses[run] += [one_step(replica, rank, step) for step in range(first, last)]
                    save_checkpoint(folder, replica, last, note="halfway")
        found[name] = losses
    return found


def losing(rank: int, size: int, arguments: Any) -> dict[str, Any]:
    """The last rank is killed, stopped or slow at step 3: what the others say."""
    model = make_model()
    name, fate = arguments["name"], arguments["fate"]
    replica = wrap(model, make_optimizer(name, model), name, bucket_bytes=900, patience_s=2)
    try:
        for step in range(6):
            if step == 3:
                dist.barrier()
                if rank == size - 1:
                    meet(fate)
            one_step(replica, rank, step)
    except CapstanError as error:
        return {"error": f"{type(error).__name__}: {error}", "step": step}
    return {"error": "none"}


def meet(fate: str) -> None:
    """Be killed, stopped, or too slow for the others' patience."""
    if fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "stopped":
        stop()
    stay()


def asynchronous(rank: int, size: int, arguments: Any) -> dict[str, Any]:
    """Averaging without training keeps the sum; many times aborted and resumed; then all are the same."""
    model = make_model()
    algorithm = AsyncAverage(interval_s=0.001)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with wrap(model, optimizer, algorithm, bucket_bytes=900, patience_s=20) as replica:
        algorithm.abort()
        with torch.no_grad():
            for each in model.parameters():
                each.add_(rank)
        before = torch.cat([each.detach().double().reshape(-1) for each in model.parameters()])
        algorithm.resume()
        while algorithm.num_rounds < 3:
            time.sleep(0.001)
        algorithm.abort()
        rounds = algorithm.num_rounds
        after = torch.cat([each.detach().double().reshape(-1) for each in model.parameters()])
        for step in range(arguments["cycles"]):
            algorithm.resume()
            one_step(replica, rank, step)
            algorithm.abort()
        trained = torch.cat([each.detach().reshape(-1) for each in model.parameters()])
        replica.average_weights()
        averaged = torch.cat([each.detach().reshape(-1) for each in model.parameters()])
    return {"before": before, "after": after, "rounds": rounds, "trained": trained, "averaged": averaged}


def unusual(rank: int, size: int, arguments: Any) -> dict[str, Any]:
    """Accumulated gradients, parameters without any, and clipping after backward."""
    found: dict[str, Any] = {}
    model = make_model()
    spare = nn.Linear(3, 3)
    holder = nn.ModuleDict({"used": model, "spare": spare})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = holder

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.parts["used"](inputs)

    both = Both()
    optimizer = torch.optim.SGD(both.parameters(), lr=0.1)
    with wrap(both, optimizer, "gradient_allreduce", bucket_bytes=900) as replica:
        for step in range(3):
            optimizer.zero_grad()
            with replica.no_sync():
                loss_of(replica, rank, 2 * step).backward()
            loss_of(replica, rank, 2 * step + 1).backward()
            found["norm"] = float(nn.utils.clip_grad_norm_(both.parameters(), 0.5))
            optimizer.step()
        found["weights"] = torch.cat([each.detach().reshape(-1) for each in both.parameters()])
        found["spare gradient"] = spare.weight.grad
    reference = make_model()
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in range(3):
        plain.zero_grad()
        for each in range(size):
            ((loss_of(reference, each, 2 * step) + loss_of(reference, each, 2 * step + 1)) / size).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        plain.step()
    found["reference"] = torch.cat([each.detach().reshape(-1) for each in reference.parameters()])
    return found


def disagreeing(rank: int, size: int, arguments: Any) -> str:
    """Ranks that were started with different algorithms."""
    model = make_model()
    try:
        wrap(model, make_optimizer("", model), ["bytegrad", "onebit"][rank], patience_s=10)
    except CapstanError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def misused(rank: int, size: int, arguments: Any) -> list[str]:
    """What wrap says to things that cannot work."""
    said = []
    model = make_model()
    frozen = make_model().requires_grad_(False)
    for call in (
        lambda: wrap(model, make_optimizer("", model), "bytegard"),
        lambda: wrap(model, make_optimizer("", model), ""),
        lambda: wrap(model, make_optimizer("", model), "qadam"),
        lambda: wrap(frozen, make_optimizer("", model), "bytegrad"),
    ):
        try:
            call()
        except CapstanError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def unclosed() -> None:
    """A script that averages in the background and just ends."""
    dist.init_process_group("gloo")
    inner = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    model = wrap(inner, optimizer, "async", patience_s=20)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
