"""One stage of links.py: steps over an emulated link, each in its variant, timed once nothing is new."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from capstan.pipelining import Compression, Pipeline

INTERFACE = Path("/sys/class/net/capstan0/statistics/tx_bytes")


class Pause(torch.autograd.Function):
    """Compute that takes its time and no processor, as an accelerator's."""

    @staticmethod
    def forward(context: Any, values: Tensor, compute_s: float) -> Tensor:
        context.compute_s = compute_s
        time.sleep(compute_s / 3)
        return values.view_as(values)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        time.sleep(2 * context.compute_s / 3)
        return gradients[0], None


class Scale(nn.Module):
    """A weight a feature, and a pause."""

    def __init__(self, hidden: int, compute_s: float) -> None:
        super().__init__()
        self.weight, self._compute_s = nn.Parameter(torch.ones(hidden)), compute_s

    def forward(self, values: Tensor) -> Tensor:
        paused: Tensor = Pause.apply(values * self.weight, self._compute_s)
        return paused


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean square of what differs."""
    return (outputs - targets).square().mean()


def timed(bits: dict[str, Any], schedule: str, told: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step, and the bytes that a rank's interface and its ledger counted meanwhile."""
    model = nn.Sequential(*(Scale(told["hidden"], told["compute_s"]) for _ in range(dist.get_world_size())))
    pipeline = Pipeline(
        model,
        loss,
        num_micro_batches=told["micro_batches"],
        schedule=schedule,
        compression=Compression.of_bits(**bits),
    )
    optimizer = torch.optim.SGD(pipeline.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(told["batch"], told["tokens"], told["hidden"], generator=generator)
    seconds: list[float] = []
    for step in range(told["steps"] + 2):
        if step == 2:  # the first visits are over
            pipeline.group.gather(None)
            sent_bytes, counted = int(INTERFACE.read_text()), pipeline.ledger.traffic
        start_s = time.perf_counter()
        optimizer.zero_grad()
        pipeline.step(inputs, inputs, sample_ids=range(len(inputs)))
        optimizer.step()
        seconds.append(time.perf_counter() - start_s)
    interface_bytes = int(INTERFACE.read_text()) - sent_bytes
    ledger_bytes = sum((pipeline.ledger.traffic - counted).size_bytes.values())
    every = pipeline.group.gather([seconds[2:], interface_bytes, ledger_bytes])
    slowest = [max(each) for each in zip(*(own[0] for own in every), strict=True)]
    return {
        "step_s": sum(slowest) / len(slowest),
        "spread_s": max(slowest) - min(slowest),
        "interface_bytes": [own[1] for own in every],
        "ledger_bytes": [own[2] for own in every],
    }


def main() -> None:
    told = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {
        f"{name}, {schedule}": timed(bits, schedule, told)
        for name, bits in told["variants"].items()
        for schedule in told["schedules"]
    }
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
