"""Who trains a model in a test's loop: an algorithm, PyTorch's DDP, or an algorithm's definition by hand."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from capstan.data_parallel import (
    AsyncAverage,
    ByteGrad,
    Decentralised,
    DiLoCo,
    LocalSGD,
    LowPrecisionDecentralised,
    OneBit,
    PowerSGD,
    QAdam,
    QAdamMomenta,
    RandomKGradients,
    TopKGradients,
    wrap,
)
from capstan.transport import Group

EXACT: dict[str, Callable[[], Any]] = {
    "gradient_allreduce": lambda: "gradient_allreduce",
    "bytegrad": lambda: ByteGrad("identity"),
    "onebit": lambda: OneBit("identity"),
    "topk": lambda: TopKGradients("topk:1.0"),
    "randomk": lambda: RandomKGradients("randomk:1.0"),
    "powersgd": lambda: PowerSGD(rank=64),
    "qadam": QAdamMomenta,
    "decentralized": Decentralised,
    "low_precision_decentralized": lambda: LowPrecisionDecentralised("identity"),
    "local_sgd": lambda: LocalSGD(2),
    "diloco": lambda: DiLoCo(2, codec="identity", error_feedback=False),
    "async": lambda: AsyncAverage(0.0),
}
"""Every algorithm with codecs that lose nothing."""

AVERAGES_GRADIENTS = ("gradient_allreduce", "bytegrad", "onebit", "topk", "randomk", "powersgd", "qadam")


class Face:
    """What trains a model: `kind` is "algorithm", "exact" or "definition"."""

    def __init__(self, kind: str, algorithm: str, group: Group) -> None:
        self.kind, self.algorithm, self.group = kind, algorithm, group
        self.opened: list[Any] = []

    @property
    def is_definition(self) -> bool:
        return self.kind == "definition"

    def optimizer(self, parameters: Any, **how: Any) -> torch.optim.Optimizer:
        if self.algorithm != "qadam":
            return torch.optim.SGD(parameters, **{"lr": 0.05, "momentum": 0.9} | how)
        if self.is_definition:
            return torch.optim.Adam(parameters, **{"lr": 0.01} | how)
        return QAdam(parameters, warmup_steps=1000 if self.kind == "exact" else 3, **{"lr": 0.01} | how)

    def wrap(self, model: nn.Module, optimizer: Any = None, **ddp: Any) -> Any:
        if not self.is_definition:
            made = EXACT[self.algorithm]() if self.kind == "exact" else self.algorithm
            group = Group(patience_s=20) if self.opened else self.group  # of one model each
            self.opened.append(wrap(model, optimizer, made, group=group, bucket_bytes=300))
            return self.opened[-1]
        if self.algorithm in AVERAGES_GRADIENTS:
            return DistributedDataParallel(model, **ddp)
        return DEFINITIONS[self.algorithm](model, optimizer)

    def close(self) -> None:
        for each in self.opened:
            each.close()


class Definition(nn.Module):
    """A plain model, and what an algorithm does with its weights around the optimizer's steps."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.module, self.steps, self.is_in_step, self.is_stepping = module, 0, False, False
        self.trained = [each for each in module.parameters() if each.requires_grad]
        optimizer.register_step_pre_hook(lambda *_: self.before())
        optimizer.register_step_post_hook(lambda *_: self.after())
        self.start()

    def forward(self, *inputs: Any) -> Any:
        if self.training and torch.is_grad_enabled() and not self.is_in_step:
            self.is_in_step = True
            with torch.no_grad():
                self.begin()
        return self.module(*inputs)

    def no_sync(self) -> Any:
        return nullcontext()

    def flat(self) -> torch.Tensor:
        return torch.cat([each.detach().reshape(-1) for each in self.trained])

    def put(self, flat: torch.Tensor) -> None:
        with torch.no_grad():
            for each, part in zip(self.trained, flat.split([p.numel() for p in self.trained]), strict=True):
                each.copy_(part.view(each.shape))

    def before(self) -> None:
        self.is_stepping = True

    def after(self) -> None:
        self.steps, self.is_in_step, self.is_stepping = self.steps + 1, False, False
        with torch.no_grad():
            self.end()

    def start(self) -> None: ...

    def begin(self) -> None: ...

    def end(self) -> None: ...


def mean_of(values: torch.Tensor) -> torch.Tensor:
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


class DecentralisedDefinition(Definition):
    """Of two ranks each averages with the other, whoever its peer is."""

    change: torch.Tensor | None = None

    def begin(self) -> None:
        before = self.flat()
        self.change = mean_of(before) - before

    def before(self) -> None:
        super().before()
        if self.change is not None:
            self.put(self.flat() + self.change)
            self.change = None

    def end(self) -> None:
        if self.change is not None:  # forward ran inside the step
            self.put(self.flat() + self.change)
            self.change = None


class LowPrecisionDefinition(Definition):
    """Two ranks that are told all of each other's change: x + 2/3 of how far apart they were before."""

    def start(self) -> None:
        self.known = self.flat()

    def begin(self) -> None:
        self.known = self.flat()

    def end(self) -> None:
        other = 2 * mean_of(self.known) - self.known
        self.put(self.flat() + 2 / 3 * (other - self.known))


class LocalDefinition(Definition):
    """The mean of all weights after every other step."""

    lr, momentum = 1.0, 0.0

    def start(self) -> None:
        self.anchor, self.velocity = self.flat(), torch.zeros_like(self.flat())

    def begin(self) -> None:
        if self.steps % 2 == 0:
            self.anchor = self.flat()

    def end(self) -> None:
        if self.steps % 2 == 0:
            moved = mean_of(self.anchor - self.flat())
            self.velocity = self.momentum * self.velocity + moved
            self.anchor = self.anchor - self.lr * (moved + self.momentum * self.velocity)
            self.put(self.anchor)


class DiLoCoDefinition(LocalDefinition):
    """With Nesterov's momentum."""

    lr, momentum = 0.7, 0.9


DEFINITIONS: dict[str, type[Definition]] = {
    "decentralized": DecentralisedDefinition,
    "low_precision_decentralized": LowPrecisionDefinition,
    "local_sgd": LocalDefinition,
    "diloco": DiLoCoDefinition,
}
