"""One rank of convergence.py: every algorithm on every task, one after the other."""

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from capstan.data_parallel import (
    AsyncAverage,
    DiLoCo,
    LocalSGD,
    QAdam,
    QAdamMomenta,
    algorithm_from_name,
    wrap,
)
from capstan.transport.group import Group

TEXT = Path(__file__).parents[2] / "LICENSE"
CONTEXT = 48
SPECIAL: dict[str, Any] = {
    "qadam": QAdamMomenta,
    "qadam 8 bits": lambda: QAdamMomenta(8),
    "async": lambda: AsyncAverage(interval_s=0.05),
    "local_sgd": lambda: LocalSGD(8),
    "diloco": lambda: DiLoCo(16),
}


class Task(NamedTuple):
    """A model and its data."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    lr: float


class Text(nn.Module):
    """Bytes in, logits of the next byte out, whatever lies between."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.core(tokens)
        return found.logits if hasattr(found, "logits") else found


class Lstm(nn.Module):
    """One layer of 96."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(128, 48), nn.Linear(96, 128)
        self.lstm = nn.LSTM(48, 96, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


def digits(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.data), generator=torch.Generator().manual_seed(5))
    inputs = torch.tensor(found.data, dtype=torch.float32)[order].view(-1, *shape) / 16
    targets = torch.tensor(found.target)[order]
    return inputs[:1400], targets[:1400], inputs[1400:], targets[1400:]


def text() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = torch.tensor(list(TEXT.read_bytes()))
    windows = data.unfold(0, CONTEXT + 1, 7)
    split = int(0.9 * len(windows))
    return windows[:split, :-1], windows[:split, 1:], windows[split:, :-1], windows[split:, 1:]


def make_task(name: str, seed: int) -> Task:
    torch.manual_seed(seed)
    if name == "MLP on digits":
        model: nn.Module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        return Task(model, *digits((64,)), lr=2e-3)
    if name == "CNN with batch norm on digits":
        # Its convolutions' biases have no gradient but rounding: the norm takes them away.
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip
        return Task(model, *digits((1, 8, 8)), lr=2e-3)
    if name == "LSTM on text":
        return Task(Text(Lstm()), *text(), lr=5e-3)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    return Task(Text(LlamaForCausalLM(config)), *text(), lr=3e-3)


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def run(algorithm: str, task_name: str, seed: int, steps: int, group: Group) -> tuple[float, float]:
    """Loss and accuracy on what was not trained on."""
    task = make_task(task_name, seed)
    parameters = task.model.parameters()
    if algorithm.startswith("qadam"):
        optimizer: torch.optim.Optimizer = QAdam(parameters, lr=task.lr, warmup_steps=steps // 5)
    else:
        optimizer = torch.optim.Adam(parameters, lr=task.lr)
    made = SPECIAL[algorithm]() if algorithm in SPECIAL else algorithm_from_name(algorithm)
    replica = wrap(task.model, optimizer, made, group=group, bucket_bytes=2**16)
    generator = torch.Generator().manual_seed(1000 * seed + group.rank)
    share = torch.arange(group.rank, len(task.inputs), group.size)
    for _ in range(steps):
        chosen = share[torch.randint(len(share), (16,), generator=generator)]
        optimizer.zero_grad()
        loss_of(replica, task.inputs[chosen], task.targets[chosen]).backward()
        optimizer.step()
    if isinstance(made, AsyncAverage):
        made.abort()
    replica.average_weights()
    replica.close()
    task.model.eval()
    with torch.no_grad():
        logits = task.model(task.test_inputs)
        loss = F.cross_entropy(logits.flatten(0, -2), task.test_targets.flatten()).item()
        accuracy = (logits.argmax(-1) == task.test_targets).float().mean().item()
    return loss, accuracy


def main() -> None:
    config = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = Group(patience_s=120)
    found: dict[str, Any] = {}
    for task in config["tasks"]:
        for algorithm in config["algorithms"]:
            results = [run(algorithm, task, seed, config["steps"], group) for seed in range(config["seeds"])]
            found.setdefault(task, {})[algorithm] = {
                "loss": [loss for loss, _ in results],
                "accuracy": [accuracy for _, accuracy in results],
            }
            if group.is_first:
                print(task, algorithm, results, file=sys.stderr, flush=True)
    if group.is_first:
        print(json.dumps(found), flush=True)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
