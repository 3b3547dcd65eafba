"""One stage of convergence.py: all variants and seeds, one after another."""

import json
import sys
from typing import Any

import torch
from torch import distributed as dist

from capstan.pipelining import Compression, Pipeline
from capstan.pipelining.decoder import decoder, token_loss

VOCABULARY, SEQUENCE, SAMPLES, BATCH = 64, 32, 128, 16


def texts() -> torch.Tensor:
    """Sequences whose next token follows from the last two in nine cases of ten."""
    generator = torch.Generator().manual_seed(1234)
    table = torch.randint(VOCABULARY, (VOCABULARY, VOCABULARY), generator=generator)
    rows = torch.randint(VOCABULARY, (SAMPLES, SEQUENCE + 1), generator=generator)
    follows = torch.rand(SAMPLES, SEQUENCE + 1, generator=generator) < 0.9
    for at in range(2, SEQUENCE + 1):
        rows[:, at] = torch.where(follows[:, at], table[rows[:, at - 1], rows[:, at - 2]], rows[:, at])
    return rows


def train(variant: dict[str, Any], seed: int, epochs: int) -> dict[str, list[float]]:
    """The mean loss and the bytes of each epoch."""
    rows = texts()
    model = decoder(vocabulary=VOCABULARY, sequence=SEQUENCE, dim=64, num_layers=4, feed_forward=128)
    pipeline = Pipeline(model, token_loss, compression=Compression.of_bits(**variant))
    optimizer = torch.optim.AdamW(pipeline.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    losses, wire = [], []
    for _ in range(epochs):
        before, total = pipeline.ledger.traffic, 0.0
        for ids in torch.randperm(SAMPLES, generator=generator).split(BATCH):
            optimizer.zero_grad()
            total += pipeline.step(rows[ids, :-1], rows[ids, 1:], sample_ids=ids) or 0.0
            pipeline.clip_gradients(1.0)
            optimizer.step()
        sent = sum((pipeline.ledger.traffic - before).size_bytes.values())
        every = pipeline.group.gather([sent, total * BATCH / SAMPLES])
        losses.append(every[-1][1])
        wire.append(sum(each[0] for each in every))
    return {"loss": losses, "wire_bytes": wire}


def main() -> None:
    told = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for name, variant in told["variants"].items():
        found[name] = [train(variant, seed, told["epochs"]) for seed in told["seeds"]]
        if dist.get_rank() == 0:
            last = [round(each["loss"][-1], 4) for each in found[name]]
            print(f"{name}: {last}", file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
