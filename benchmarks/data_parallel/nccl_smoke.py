"""Does data-parallel training run through NCCL, and with gradients on a GPU through gloo?

    torchrun --standalone --nproc-per-node=2 benchmarks/data_parallel/nccl_smoke.py    # two GPUs
    torchrun --standalone --nproc-per-node=2 benchmarks/data_parallel/nccl_smoke.py --wire gloo    # one GPU

For every algorithm: five steps, losses, whether all ranks end with the same weights where they should, and
how far they are from the same steps on the processor. Prints one JSON object; --record writes it as a record.
Exit code 1 if something is wrong.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from capstan.data_parallel import ALGORITHMS, GradientAllReduce, HookState, QAdam, hook, wrap
from capstan.hardware import this_machine
from capstan.transport.group import Group
from record import write_record

STEPS = 5
SAME = (
    "gradient_allreduce",
    "ring",
    "bytegrad",
    "onebit",
    "topk",
    "randomk",
    "powersgd",
    "qadam",
    "ddp hook",
)


def train(name: str, device: torch.device, group: Group) -> tuple[list[float], torch.Tensor, int]:
    """Losses, final weights, bytes sent."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256)).to(device)
    if name == "qadam":
        optimizer: torch.optim.Optimizer = QAdam(model.parameters(), lr=1e-3, warmup_steps=2)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = None
    if name == "ddp hook":
        wire = "cuda" if group.wire_device_type == "cuda" else "cpu"
        state = HookState("bytegrad", device_type=wire)
        trained: nn.Module = nn.parallel.DistributedDataParallel(model)
        trained.register_comm_hook(state, hook)
    else:
        algorithm = GradientAllReduce(route="ring") if name == "ring" else name
        trained = wrap(model, optimizer, algorithm, group=group, bucket_bytes=2**19)
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 * step + group.rank)
        inputs = torch.randn(32, 256, generator=generator).to(device)
        loss = (trained(inputs) - inputs.flip(1)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    own = f"rank {group.rank}->"
    traffic = (state or trained).ledger.traffic
    sent = sum(traffic.on(link) for link in traffic.links if link.startswith(own))
    (state or trained).close()
    weights = torch.cat([each.detach().reshape(-1) for each in model.parameters()]).cpu()
    return losses, weights, sent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wire", choices=("nccl", "gloo"), default="nccl")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if options.wire == "nccl" else "gloo")
    device = torch.device(options.device)
    on_device = Group(device_type="cuda" if options.wire == "nccl" else "cpu", patience_s=60)
    on_host = Group(patience_s=60)

    found: dict[str, Any] = {}
    names = [name for name in ALGORITHMS if name != "async"] + ["ring"] * (options.wire == "nccl")
    names += ["ddp hook"] if options.wire == "nccl" or options.device == "cpu" else []
    for name in names:
        losses, weights, sent = train(name, device, on_device)
        expected, on_processor, _ = train(name, torch.device("cpu"), on_host)
        largest = (weights - on_processor).abs().max().item()
        sums = on_host.gather(weights.double().sum().item())
        found[name] = {
            "losses": losses,
            "losses_on_cpu": expected,
            "sent_bytes": sent,
            "largest_difference_from_cpu": largest,
            "ranks_are_equal": len(set(sums)) == 1,
        }
    wrong = [name for name in SAME if name in found and not found[name]["ranks_are_equal"]]
    wrong += [name for name, each in found.items() if each["losses"][-1] >= each["losses"][0]]
    if on_host.is_first:
        print(
            json.dumps(
                {"wire": options.wire, "ranks": on_host.size, "wrong": wrong, "algorithms": found}, indent=1
            )
        )
        if options.record:
            write_record(
                f"data-parallel-{options.wire}-smoke",
                claim=f"Every algorithm runs with gradients on GPUs through {options.wire}.",
                machine=this_machine(),
                figures=found,
                bound={"value": 0, "how": "no algorithm may be wrong"},
                bars={"algorithms that are wrong": {"goal": 0, "reached": len(wrong), "holds": not wrong}},
                setting={"ranks": on_host.size, "wire": options.wire, "device": str(device)},
            )
    dist.barrier()
    sys.stdout.flush()
    os._exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
