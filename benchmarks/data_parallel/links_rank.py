"""One rank of links.py: every algorithm over one link, timed with synthetic compute or trained for its
loss.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from capstan.data_parallel import GradientAllReduce, LocalSGD, Replica, algorithm_from_name, wrap
from capstan.data_parallel.buckets import cut
from capstan.data_parallel.network_probe import probe_coding, probe_network
from capstan.data_parallel.planner import Network, Workload, predict
from capstan.transport.group import Group

SIZES = [256 * 1024] * 20  # 5.2 M parameters
CODECS = ("identity", "group8:512:float32", "sign:1024", "topk:0.01")
INTERFACE = Path("/sys/class/net/capstan0/statistics")


class Pause(torch.autograd.Function):
    """Compute that takes its time and no processor; its gradient is what was asked for."""

    @staticmethod
    def forward(context: Any, weight: Tensor, before: Tensor, forward_s: float, backward_s: float) -> Tensor:
        time.sleep(forward_s)
        context.shape, context.backward_s = weight.shape, backward_s
        return before + 0.0

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        time.sleep(context.backward_s)
        return torch.full(context.shape, 1e-3), gradients[0], None, None


class Synthetic(nn.Module):
    """Layers of parameters whose compute is a pause."""

    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(512, size // 512)) for size in SIZES)
        self.forward_s, self.backward_s = forward_s / len(SIZES), backward_s / len(SIZES)

    def forward(self) -> Tensor:
        value = torch.zeros((), requires_grad=True)
        for weight in self.weights:
            value = Pause.apply(weight, value, self.forward_s, self.backward_s)
        return value


def make_algorithm(name: str) -> Any:
    special = {
        "gradient_allreduce ring": lambda: GradientAllReduce(route="ring"),
        "local_sgd": lambda: LocalSGD(4),
    }
    return special[name]() if name in special else algorithm_from_name(name)


def timed(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step, and bytes of one."""
    model = Synthetic(config["forward_s"], config["backward_s"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped: nn.Module = model
    if name == "ddp":
        wrapped = DistributedDataParallel(model)
    elif name != "alone":
        wrapped = wrap(model, optimizer, make_algorithm(name), bucket_bytes=config["bucket_bytes"])
    seconds: list[float] = []
    for step in range(config["steps"] + 3):
        if step == 3:
            dist.barrier()
            before, counted = interface_bytes(), ledger_bytes(wrapped)
        start_s = time.perf_counter()
        optimizer.zero_grad()
        wrapped().backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start_s)
    sent = ledger_bytes(wrapped) - counted
    if isinstance(wrapped, Replica):
        wrapped.close()
    crossed = interface_bytes() - before
    dist.barrier()
    return {
        "step_s": sum(seconds[3:]) / config["steps"],
        "spread_s": max(seconds[3:]) - min(seconds[3:]),
        "ledger_bytes": sent,
        "interface_bytes": crossed,
    }


def trained(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Seconds and final loss of real training: an MLP of 5.2 M parameters on scikit-learn's digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    inputs = torch.tensor(digits.data, dtype=torch.float32) / 16
    targets = torch.tensor(digits.target)
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 1600), nn.ReLU(), nn.Linear(1600, 1600), nn.ReLU(), nn.Linear(1600, 1600), nn.ReLU(),
        nn.Linear(1600, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    wrapped: nn.Module = model
    if name == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        wrapped = wrap(model, optimizer, make_algorithm(name), bucket_bytes=config["bucket_bytes"])
    generator = torch.Generator().manual_seed(rank)
    share = torch.arange(rank, len(inputs), size)
    dist.barrier()
    start_s = time.perf_counter()
    for _ in range(config["train_steps"]):
        chosen = share[torch.randint(len(share), (32,), generator=generator)]
        optimizer.zero_grad()
        F.cross_entropy(wrapped(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()
    seconds = time.perf_counter() - start_s
    with torch.no_grad():
        loss = F.cross_entropy(model(inputs), targets).item()
    if isinstance(wrapped, Replica):
        wrapped.close()
    dist.barrier()
    return {"seconds": seconds, "loss": loss}


def ledger_bytes(model: nn.Module) -> int:
    """What this rank has sent."""
    if not isinstance(model, Replica):
        return 0
    traffic, own = model.ledger.traffic, f"rank {dist.get_rank()}->"
    return sum(traffic.on(link) for link in traffic.links if link.startswith(own))


def interface_bytes() -> int:
    """What this rank's interface has sent; 0 where there is none of its own."""
    file = INTERFACE / "tx_bytes"
    return int(file.read_text()) if file.exists() else 0


def predicted(name: str, compute_s: dict[str, float], config: dict[str, Any], networks: dict[str, Network],
              coding: dict[str, Any]) -> dict[str, float]:  # fmt: skip
    """The step by the planner on the probed network, and the ideal on the nominal one."""
    groups = cut([4 * size for size in SIZES], ["f"] * len(SIZES), bucket_bytes=config["bucket_bytes"])
    work = {"bucket_elements": tuple(sum(SIZES[at] for at in group) for group in groups)} | compute_s
    algorithm = make_algorithm(name)
    return {
        "predicted_s": predict(algorithm, Workload(**work, coding=coding), networks["probed"]).step_s,
        "ideal_s": predict(algorithm, Workload(**work), networks["nominal"]).ideal_s,
    }


def main() -> None:
    config = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = Group(patience_s=120)
    probed = probe_network(group)
    nominal = Network(num_ranks=group.size, bandwidth_bytes_per_s=config["rate"], latency_s=config["latency"])
    coding = {codec: probe_coding(group, codec) for codec in CODECS}
    found: dict[str, Any] = {
        "probed": {"bandwidth_bytes_per_s": probed.bandwidth_bytes_per_s, "latency_s": probed.latency_s},
        "coding_s_per_element": coding,
        "timed": {},
        "trained": {},
    }
    alone_s = timed("alone", config)["step_s"]
    compute = {"forward_s": config["forward_s"], "backward_s": config["backward_s"]}
    compute["optimizer_s"] = max(0.0, alone_s - sum(compute.values()))
    found["compute_s"] = alone_s
    for name in config["timed"]:
        result = timed(name, config)
        everyone = group.gather(result["step_s"])
        result["step_s"] = sum(everyone) / len(everyone)
        if name != "ddp":
            networks = {"probed": probed, "nominal": nominal}
            result |= predicted(name, compute, config, networks, coding)
        found["timed"][name] = result
    for name in config["trained"]:
        found["trained"][name] = trained(name, config)
    if group.is_first:
        print(json.dumps(found), flush=True)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
