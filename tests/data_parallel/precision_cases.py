"""Training with scaled losses and in 16 bits, for test_precision.py."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from capstan.data_parallel import HookState, hook, wrap
from capstan.errors import CapstanError

SCALES = (65536.0, 1024.0, 4096.0)
STEPS = 15


def inputs_of(rank: int, step: int, width: int) -> torch.Tensor:
    return torch.randn(16, width, generator=torch.Generator().manual_seed(100 * step + rank))


def delivered(rank: int, size: int, names: list[str]) -> dict[str, float]:
    """How far the sum of delivered gradients is from that of the true means, by who scales the loss."""
    return {
        f"{name} {how}": lost(rank, name, how)
        for name in names
        for how in ("nobody", "by hand", "GradScaler", "hook")
    }


def lost(rank: int, name: str, how: str) -> float:
    torch.manual_seed(0)
    model = nn.Linear(24, 24, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scale = [1.0]
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALES[0], enabled=how == "GradScaler")
    if how == "hook":
        faced: Any = DistributedDataParallel(model)
        state = HookState(name, patience_s=20, loss_scale=lambda: scale[0])
        faced.register_comm_hook(state, hook)
    else:
        state = None
        asked = {"loss_scale": lambda: scale[0]} if how == "by hand" else {}
        faced = wrap(model, optimizer, name, patience_s=20, **asked)
    true, found = torch.zeros(24, 24), torch.zeros(24, 24)
    for step in range(STEPS):
        wanted = SCALES[step * len(SCALES) // STEPS]
        scale[0] = 1.0 if how == "nobody" else wanted
        if how == "GradScaler" and step:
            scaler.update(wanted)
        inputs = inputs_of(rank, step, 24)
        optimizer.zero_grad()
        loss = (faced(inputs) - inputs.roll(1, 1)).pow(2).mean()
        (mean,) = torch.autograd.grad((model(inputs) - inputs.roll(1, 1)).pow(2).mean(), model.weight)
        dist.all_reduce(mean)
        true += mean / 2
        if how == "GradScaler":
            scaler.scale(loss).backward()
            found += model.weight.grad / scaler.get_scale()
            scaler.step(optimizer)
        else:
            (loss * scale[0]).backward()
            found += model.weight.grad / scale[0]
            optimizer.step()
    (state or faced).close()
    return float((found - true).norm() / true.norm())


def infinite_behind_a_hook(rank: int, size: int, names: list[str]) -> dict[str, list[bool]]:
    """Whether each step's gradients were finite where those of step 2 are not on the first rank."""
    found = {}
    for name in names:
        torch.manual_seed(0)
        ddp = DistributedDataParallel(nn.Linear(8, 16))
        state = HookState(name, patience_s=20)
        ddp.register_comm_hook(state, hook)
        seen = []
        for step in range(6):
            ddp.zero_grad()
            loss = ddp(inputs_of(rank, step, 8)).pow(2).mean()
            (loss * torch.inf if (step, rank) == (2, 0) else loss).backward()
            seen.append(bool(ddp.module.weight.grad.isfinite().all()))
        state.close()
        found[name] = seen
    return found


def sixteen_bits(rank: int, size: int, names: list[str]) -> dict[str, float]:
    """The loss at the end of training in bfloat16, on what was not trained on."""
    return {name: last_loss(rank, name) for name in names}


def last_loss(rank: int, name: str) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4)).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with wrap(model, optimizer, name, patience_s=20) as trained:
        for step in range(150):
            inputs = inputs_of(rank, step, 16).bfloat16()
            optimizer.zero_grad()
            (trained(inputs) - inputs[:, :4].sin()).float().pow(2).mean().backward()
            optimizer.step()
    inputs = torch.randn(512, 16, generator=torch.Generator().manual_seed(7)).bfloat16()
    with torch.no_grad():
        return float((model(inputs) - inputs[:, :4].sin()).float().pow(2).mean())


def near_the_end_of_float16(rank: int, size: int, names: list[str]) -> dict[str, list[bool]]:
    """Whether each step's gradients were finite: those of step 1 are near float16's largest number."""
    found = {}
    for name in names:
        model = nn.Linear(64, 64, bias=False).half()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        seen = []
        with wrap(model, optimizer, name, patience_s=20) as trained:
            for step in range(4):
                optimizer.zero_grad()
                scale = 60000.0 if step == 1 else 1.0
                (trained(torch.ones(1, 64).half()).float().sum() * scale).backward()
                optimizer.step()
                seen.append(bool(model.weight.grad.isfinite().all()))
        found[name] = seen
    return found


def misused_scale(rank: int, size: int, arguments: Any) -> str:
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        with wrap(model, optimizer, "onebit", patience_s=20, loss_scale=lambda: 0.0) as trained:
            trained(inputs_of(rank, 0, 8)).sum().backward()
    except CapstanError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"
