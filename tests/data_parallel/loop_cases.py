"""Training loops off the beaten path, for test_loops.py: each through DDP or through wrap."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from capstan.data_parallel import (
    AsyncAverage,
    ByteGrad,
    Decentralised,
    DiLoCo,
    LocalSGD,
    OneBit,
    QAdam,
    QAdamMomenta,
    load_latest,
    save_checkpoint,
    wrap,
)
from capstan.errors import CapstanError

Optimizers = Callable[[Any], torch.optim.Optimizer]
ADAMW: Optimizers = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)  # noqa: E731
SGD: Optimizers = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)  # noqa: E731


def inputs_of(rank: int, step: int, width: int = 8) -> torch.Tensor:
    return torch.randn(16, width, generator=torch.Generator().manual_seed(100 * step + rank))


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([each.detach().reshape(-1) for each in model.parameters()])


def faced(face: str, model: nn.Module, optimizer: Any, **how: Any) -> Any:
    if face == "DDP":
        return DistributedDataParallel(model, **how)
    return wrap(model, optimizer, face, patience_s=20, bucket_bytes=300)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))


class Tasks(nn.Module):
    """A trunk and two heads, one of which is used at a time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.heads = nn.Linear(8, 8), nn.ModuleList(nn.Linear(8, 2) for _ in range(2))

    def forward(self, inputs: torch.Tensor, task: int) -> torch.Tensor:
        return self.heads[task](torch.tanh(self.trunk(inputs)))


def unused(rank: int, face: str) -> torch.Tensor:
    """Heads that no rank uses in a step, and then one that only the last rank uses."""
    model = Tasks()
    optimizer = ADAMW(model.parameters())
    trained = faced(face, model, optimizer, find_unused_parameters=True)
    for step in range(12):
        task = (0, 1, rank % 2)[step // 4]
        optimizer.zero_grad()
        inputs = inputs_of(rank, step)
        (trained(inputs, task) - inputs[:, :2].sin()).pow(2).mean().backward()
        optimizer.step()
    return weights_of(model)


def frozen(rank: int, face: str) -> torch.Tensor:
    """A layer is frozen half way."""
    model = small()
    optimizer = SGD(model.parameters())
    trained = faced(face, model, optimizer, find_unused_parameters=True)
    for step in range(8):
        if step == 4:
            model[0].requires_grad_(False)
        optimizer.zero_grad()
        inputs = inputs_of(rank, step)
        (trained(inputs) - inputs[:, :2].sin()).pow(2).mean().backward()
        optimizer.step()
    return weights_of(model)


def kept(rank: int, face: str) -> torch.Tensor:
    """Gradients that the program keeps while the next ones are made."""
    model = small()
    optimizer = SGD(model.parameters())
    trained = faced(face, model, optimizer)
    found = []
    for step in range(4):
        optimizer.zero_grad()
        trained(inputs_of(rank, step)).pow(2).mean().backward()
        found.append(model[0].weight.grad)
    return torch.stack(found)


class Blocks(nn.Module):
    """Blocks under checkpointing, re-entrant or not."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use_reentrant = use_reentrant
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        inputs = inputs.requires_grad_()
        for block in self.blocks:
            inputs = checkpoint(block, inputs, use_reentrant=self.use_reentrant)
        return inputs


def checkpointed(rank: int, face: str) -> torch.Tensor:
    model = Blocks(use_reentrant=face != "DDP")
    optimizer = SGD(model.parameters())
    trained = faced(face, model, optimizer)
    for step in range(6):
        optimizer.zero_grad()
        trained(inputs_of(rank, step)).pow(2).mean().backward()
        optimizer.step()
    return weights_of(model)


def normed(rank: int, face: str) -> torch.Tensor:
    """Statistics of a batch norm, which follow the first rank's as under DDP."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = SGD(model.parameters())
    trained = faced(face, model, optimizer)
    for step in range(5):
        optimizer.zero_grad()
        trained(inputs_of(rank, step)).pow(2).mean().backward()
        optimizer.step()
    trained.train()
    trained(inputs_of(rank, 9))
    return torch.cat([weights_of(model), model[1].running_mean, model[1].running_var])


def optimizer_after(rank: int, face: str) -> torch.Tensor:
    """The usual order of a DDP script: the model is wrapped first."""
    model = small()
    trained = DistributedDataParallel(model) if face == "DDP" else wrap(model, algorithm=face, patience_s=20)
    optimizer = SGD(trained.parameters())
    for step in range(4):
        optimizer.zero_grad()
        trained(inputs_of(rank, step)).pow(2).mean().backward()
        optimizer.step()
    return weights_of(model)


LIKE_DDP = {
    "unused": unused,
    "frozen": frozen,
    "kept": kept,
    "checkpointed": checkpointed,
    "normed": normed,
    "optimizer after": optimizer_after,
}


def like_ddp(rank: int, size: int, arguments: Any) -> dict[str, list[torch.Tensor]]:
    return {name: [run(rank, "DDP"), run(rank, "gradient_allreduce")] for name, run in LIKE_DDP.items()}


def quantised(rank: int, size: int, arguments: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of what no rank used, and of what was frozen, before and after, in few bits."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for face in arguments:
        model = Tasks()
        optimizer = SGD(model.parameters())
        with wrap(model, optimizer, face, patience_s=20, bucket_bytes=300) as trained:
            moved = []
            for step in range(6):
                before = weights_of(model.heads[1 - step // 3])
                optimizer.zero_grad()
                trained(inputs_of(rank, step), step // 3).pow(2).mean().backward()
                optimizer.step()
                moved.append((weights_of(model.heads[1 - step // 3]) - before).abs().max())
        found[face] = {"moved": torch.stack(moved), "weights": weights_of(model)}
    return found


def closures(rank: int, size: int, arguments: Any) -> dict[str, list[float]]:
    """The losses of an ordinary loop, and of optimizer.step(closure)."""
    found = {}
    for peers in ("shift_one", "all"):
        for uses_closure in (False, True):
            torch.manual_seed(0)
            model = nn.Linear(8, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            losses = []
            with wrap(model, optimizer, Decentralised(peers), patience_s=20) as trained:
                for step in range(20):
                    inputs = inputs_of(rank, step)

                    def closure(trained: Any = trained, inputs: torch.Tensor = inputs) -> torch.Tensor:
                        trained.zero_grad()
                        loss = (trained(inputs) - inputs.sum(1, keepdim=True)).pow(2).mean()
                        loss.backward()
                        return loss

                    if uses_closure:
                        loss = optimizer.step(closure)
                    else:
                        loss = closure()
                        optimizer.step()
                    losses.append(float(loss))
            found[f"{peers} {'closure' if uses_closure else 'loop'}"] = losses
    return found


class Boom(torch.autograd.Function):
    """Raises in backward when told to."""

    is_on = False

    @staticmethod
    def forward(_: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        if Boom.is_on:
            raise MemoryError("pretended")
        return gradient


def caught(rank: int, size: int, arguments: Any) -> torch.Tensor:
    """A backward pass that raises half way on all ranks, is caught, and training that goes on."""
    model = small()
    optimizer = SGD(model.parameters())
    with wrap(model, optimizer, "gradient_allreduce", patience_s=20, bucket_bytes=64) as trained:
        for step in range(6):
            optimizer.zero_grad()
            Boom.is_on = step == 3
            outputs = model[2](Boom.apply(torch.tanh(model[0](inputs_of(rank, step)))))
            trained(inputs_of(rank, step)).sum().mul(0)  # a forward pass begins the step
            try:
                outputs.pow(2).mean().backward()
            except MemoryError:
                continue
            optimizer.step()
    return weights_of(model)


def infinite(rank: int, size: int, arguments: Any) -> dict[str, list[float]]:
    """One infinite gradient on one rank under a gradient scaler: losses, and how many steps were skipped."""
    found = {}
    for name in arguments:
        model = small()
        optimizer = QAdam(model.parameters(), warmup_steps=2) if name == "qadam" else SGD(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        losses, skipped = [], 0
        with wrap(model, optimizer, name, patience_s=20, bucket_bytes=300) as trained:
            for step in range(8):
                optimizer.zero_grad()
                loss = trained(inputs_of(rank, step)).pow(2).mean()
                scaler.scale(loss * torch.inf if (step, rank) == (4, 0) else loss).backward()
                before = weights_of(model)
                scaler.step(optimizer)
                scaler.update()
                skipped += int(torch.equal(before, weights_of(model)))
                losses.append(float(loss))
        found[name] = [skipped, *losses, *weights_of(model).tolist()]
    return found


def loaded(rank: int, size: int, arguments: Any) -> dict[str, float]:
    """Weights that are loaded after wrapping stay as they are at a learning rate of 0."""
    torch.manual_seed(1)
    wanted, found = nn.Linear(8, 8).state_dict(), {}
    for name, algorithm in {
        "local_sgd": LocalSGD(2),
        "diloco": DiLoCo(2),
        "low_precision_decentralized": "low_precision_decentralized",
        "decentralized": "decentralized",
    }.items():
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with wrap(model, optimizer, algorithm, patience_s=20) as trained:
            model.load_state_dict(wanted)
            for _ in range(5):
                trained(torch.ones(2, 8)).sum().backward()
                optimizer.step()
            found[name] = float((model.weight - wanted["weight"]).abs().max())
    return found


def averaged(rank: int, size: int, arguments: Any) -> list[torch.Tensor]:
    """All weights after every `average_weights`, while averaging goes on in the background."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    with wrap(model, optimizer, AsyncAverage(0.0), patience_s=20, bucket_bytes=300) as trained:
        for step in range(8):
            optimizer.zero_grad()
            trained(inputs_of(rank, step)).pow(2).mean().backward()
            optimizer.step()
            trained.average_weights()
            found.append(weights_of(model))
    return found


class Normed(nn.Module):
    """A bias in front of a batch norm has no gradient but rounding, and a key's bias none in a softmax."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 1))
        self.late = nn.Linear(8, 1)

    def forward(self, inputs: torch.Tensor, is_late: bool) -> torch.Tensor:
        return self.layers(inputs) + (self.late(inputs) if is_late else 0)


def no_gradients(rank: int, size: int, arguments: Any) -> dict[str, list[float]]:
    """QAdam where gradients are almost 0, and a layer that is used only after the variance was frozen: first
    and last loss, and the largest weight. `None` bits: plain Adam."""
    found = {}
    for bits in (None, 8, 1):
        model = Normed()
        optimizer = QAdam(model.parameters(), lr=3e-3, warmup_steps=30 if bits else 1000)
        losses = []
        with wrap(model, optimizer, QAdamMomenta(bits or 1), patience_s=20) as trained:
            for step in range(120):
                inputs = inputs_of(rank, step)
                optimizer.zero_grad()
                loss = (trained(inputs, step >= 60) - inputs[:, :1].sin()).pow(2).mean()
                loss.backward()
                optimizer.step()
                losses.append(float(loss))
        found[str(bits)] = [losses[0], sum(losses[-10:]) / 10, float(weights_of(model).abs().max())]
    return found


def clipped(rank: int, size: int, arguments: Any) -> dict[str, list[torch.Tensor]]:
    """QAdam's weights with and without a loss scale, and with and without a bound that nothing reaches, and
    the move of a step whose gradient is a thousandfold, clipped."""
    found: dict[str, list[torch.Tensor]] = {}
    for scale, bound in ((1.0, None), (1024.0, None), (1.0, 1e9), (1.0, 1.0)):
        model = small()
        optimizer = QAdam(model.parameters(), lr=1e-3, warmup_steps=4)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
        with wrap(model, optimizer, QAdamMomenta(8), patience_s=20) as trained:
            for step in range(10):
                optimizer.zero_grad()
                loss = trained(inputs_of(rank, step)).pow(2).mean() * (1000 if step == 9 else 1)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                if bound is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), bound)
                before = weights_of(model)
                scaler.step(optimizer)
                scaler.update()
        found[f"{scale} {bound}"] = [weights_of(model), weights_of(model) - before]
    return found


def saved(rank: int, size: int, folder: str) -> list[str]:
    """What a checkpoint keeps, and what it refuses."""
    model = small()
    optimizer = SGD(model.parameters())
    said = []
    with wrap(model, optimizer, "gradient_allreduce", patience_s=20) as trained:
        save_checkpoint(folder, trained, 1, best=np.float64(0.5))
        said.append(str(load_latest(folder, trained)))
        try:
            save_checkpoint(folder, trained, 2, where=Path("x"))
        except CapstanError as error:
            said.append(f"{type(error).__name__}: {error}")
        trained.group.gather(None)
    return said


def other_world(rank: int, size: int, folder: str) -> str:
    """A folder of two ranks' checkpoints, on three."""
    model = small()
    optimizer = SGD(model.parameters())
    with wrap(model, optimizer, "gradient_allreduce", patience_s=20) as trained:
        try:
            return str(load_latest(folder, trained))
        except CapstanError as error:
            return f"{type(error).__name__}: {error}"


def with_closure(model: nn.Module) -> None:
    optimizer = QAdam(model.parameters())
    with wrap(model, optimizer, "qadam", patience_s=20):
        optimizer.step(lambda: model(torch.ones(1, 4)).sum())


def refused(rank: int, size: int, arguments: Any) -> list[str]:
    """What wrap says to what cannot be trained together; nothing is sent."""
    model, said = nn.Linear(4, 1), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, dtype=torch.complex64))

    for call in (
        lambda: wrap(DistributedDataParallel(model), optimizer, "bytegrad"),
        lambda: wrap(nn.Linear(4, 1, device="meta"), optimizer, "bytegrad"),
        lambda: wrap(Complex(), optimizer, "bytegrad"),
        lambda: wrap(nn.Embedding(4, 2, sparse=True), optimizer, "bytegrad"),
        lambda: wrap(model, None, "local_sgd"),
        lambda: wrap(model, "sgd", "bytegrad"),
        lambda: wrap(model, torch.optim.SGD(nn.Linear(4, 1).parameters(), lr=0.1), "bytegrad"),
        lambda: wrap(model, optimizer, 3),
        lambda: wrap(model, optimizer, ByteGrad, bucket_bytes=0),
        lambda: wrap(model, optimizer, ByteGrad, patience_s=0),
        lambda: Decentralised(every=1.5),
        lambda: with_closure(model),
        lambda: wrap(model, optimizer, OneBit(route="machines", machines=[[0]]), patience_s=20),
    ):
        try:
            call()
        except CapstanError as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("accepted")
    return said


def twice(rank: int, size: int, arguments: Any) -> str:
    """A block that is used twice under re-entrant checkpointing, whose first gradient was sent."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(8, 8)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            inputs = inputs.requires_grad_()
            for _ in range(2):
                inputs = checkpoint(self.block, inputs, use_reentrant=True)
            return inputs

    torch.manual_seed(0)
    model = Twice()
    optimizer = SGD(model.parameters())
    with wrap(model, optimizer, "gradient_allreduce", patience_s=20, bucket_bytes=1) as trained:
        try:
            for step in range(2):
                trained(inputs_of(rank, step)).pow(2).mean().backward()
        except CapstanError as error:
            return f"{type(error).__name__}: {error}"
    return "accepted"
