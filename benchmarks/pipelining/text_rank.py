"""One stage of text.py: all variants and seeds, one after another."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from capstan.models import cut_causal_lm, load_stage
from capstan.pipelining import Compression, Pipeline
from capstan.pipelining.decoder import token_loss


def rows(path: str, told: dict[str, Any], count: int) -> Tensor:
    """Samples that follow each other in a text's bytes."""
    size = told["sequence"]
    text = torch.frombuffer(bytearray(Path(path).read_bytes()[: count * size + 1]), dtype=torch.uint8)
    return text.long().unfold(0, size + 1, size)


def train(bits: dict[str, Any], folder: Path, seed: int, told: dict[str, Any]) -> dict[str, list[float]]:
    """Mean loss, held-out loss and bytes of each epoch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    samples, held_out = rows(told["data"], told, told["samples"]), rows(told["held_out"], told, 64)
    pipeline = Pipeline(
        load_stage(folder, cut_causal_lm(folder, size)[rank]),
        token_loss,
        compression=Compression.of_bits(**bits),
    )
    optimizer = torch.optim.AdamW(pipeline.parameters(), lr=told["learning_rate"])
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = {"loss": [], "held_out_loss": [], "wire_bytes": []}
    for _ in range(told["epochs"]):
        before, total = pipeline.ledger.traffic, 0.0
        for ids in torch.randperm(len(samples), generator=generator).split(told["batch"]):
            optimizer.zero_grad()
            loss = pipeline.step(samples[ids, :-1], samples[ids, 1:], sample_ids=ids)
            total += (loss or 0.0) * len(ids) / len(samples)
            pipeline.clip_gradients(1.0)
            optimizer.step()
        sent = sum((pipeline.ledger.traffic - before).size_bytes.values())
        kept = pipeline.evaluate(held_out[:, :-1], held_out[:, 1:])
        every = pipeline.group.gather([sent, total, kept])
        found["wire_bytes"].append(sum(each[0] for each in every))
        found["loss"].append(every[-1][1])
        found["held_out_loss"].append(every[-1][2])
    return found


def main() -> None:
    told = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name, bits in told["variants"].items():
        found[name] = [
            train(bits, Path(told["models"]) / str(seed), seed, told) for seed in range(told["seeds"])
        ]
        if dist.get_rank() == 0:
            last = [round(each["held_out_loss"][-1], 4) for each in found[name]]
            print(f"{name}: {last}", file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
