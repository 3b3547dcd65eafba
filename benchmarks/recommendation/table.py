"""Rows a second, forward + backward + update, beside torch and FBGEMM on the same batches in the same run.

    python benchmarks/recommendation/table.py --threads 2 --record
    PYTHONPATH=/path/to/fbgemm python benchmarks/recommendation/table.py --threads 2

FBGEMM takes part where it can be imported: pip install --no-deps --target /path/to/fbgemm
fbgemm-gpu-cpu==1.8.0 (with PyTorch 2.13). It is no dependency of Capstan.

Question: are an embedding table's rows read and updated at the speed of the memory? Expected before the
run: at D = 64 twice FBGEMM's rows/s, and at least half of what the memory, measured in this run, allows.

    seconds of a looked-up ID = u (4 D + 2 row) / scattered + 8 D / L / copied
    u: distinct / IDs, L: IDs of a sample

The embedding is read for the lookup; the row is read and written by the update; both lie scattered over the
table, so they move at the rate at which scattered rows can be read (the best of several gathers of distinct
rows of a table as large), which is the binding term: a copy is several times as fast. A sample's pooled
vector goes out and its gradient comes in, one after the other.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from capstan.hardware import this_machine
from capstan.recommendation import Adagrad, Adam, EmbeddingTable, HybridEmbedding, RowWiseAdagrad
from record import write_record

Step = Callable[[int], None]


def batches_of(options: argparse.Namespace) -> list[tuple[np.ndarray, np.ndarray]]:
    """IDs and offsets of each batch; Zipf's ranks are spread over the rows, as hashes would."""
    generator = np.random.default_rng(0)
    spread = generator.permutation(options.rows)
    chances = 1.0 / np.arange(1, options.rows + 1) ** options.zipf
    cumulated = np.cumsum(chances / chances.sum())
    count = options.samples * options.ids_per_sample
    offsets = np.arange(0, count + 1, options.ids_per_sample)
    ranks = (np.searchsorted(cumulated, generator.random(count)) for _ in range(options.batches))
    return [(spread[np.minimum(each, options.rows - 1)], offsets) for each in ranks]


def capstan_step(
    optimizer: Any, options: argparse.Namespace, batches: list[Any], gradient: torch.Tensor
) -> Step:
    table = EmbeddingTable(options.dim, capacity=options.rows, optimizer=optimizer, threads=options.threads)
    embedding = HybridEmbedding({"a": table})
    for start in range(0, options.rows, 1 << 16):  # every row is there, as in the others' tables
        embedding({"a": np.arange(start, min(options.rows, start + (1 << 16)))})

    def step(index: int) -> None:
        embedding({"a": batches[index]})["a"].backward(gradient)
        embedding.step()

    return step


def torch_step(make: Any, options: argparse.Namespace, batches: list[Any], gradient: torch.Tensor) -> Step:
    bag = torch.nn.EmbeddingBag(options.rows, options.dim, mode="sum", sparse=True)
    optimizer = make(list(bag.parameters()))
    tensors = [(torch.from_numpy(ids), torch.from_numpy(offsets[:-1])) for ids, offsets in batches]

    def step(index: int) -> None:
        optimizer.zero_grad()
        bag(*tensors[index]).backward(gradient)
        optimizer.step()

    return step


def fbgemm_step(kind: str, options: argparse.Namespace, batches: list[Any], gradient: torch.Tensor) -> Step:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    bag = SplitTableBatchedEmbeddingBagsCodegen(
        [(options.rows, options.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=getattr(EmbOptimType, kind),
        learning_rate=0.01,
        eps=1e-8,
    )
    tensors = [(torch.from_numpy(ids), torch.from_numpy(offsets)) for ids, offsets in batches]

    def step(index: int) -> None:
        bag(*tensors[index]).backward(gradient)

    return step


def contenders() -> Iterator[tuple[str, Any, Any]]:
    yield "capstan, row-wise Adagrad", capstan_step, RowWiseAdagrad()
    yield "capstan, Adagrad", capstan_step, Adagrad()
    yield "capstan, Adam", capstan_step, Adam()
    yield "torch EmbeddingBag, Adagrad", torch_step, lambda p: torch.optim.Adagrad(p, lr=0.01)
    yield "torch EmbeddingBag, SparseAdam", torch_step, lambda p: torch.optim.SparseAdam(p, lr=0.001)
    yield "fbgemm TBE, row-wise Adagrad", fbgemm_step, "EXACT_ROWWISE_ADAGRAD"
    yield "fbgemm TBE, Adagrad", fbgemm_step, "EXACT_ADAGRAD"


def copy_rate(threads: int, repeats: int = 7) -> float:
    """Bytes read and written in a second by a copy of 256 MiB: the best of several."""
    source = torch.ones(64 << 20)
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started_s)
    return 2 * source.nbytes / min(seconds)


def scattered_rate(options: argparse.Namespace, repeats: int = 15) -> float:
    """Bytes read in a second by a gather of distinct rows from all over a table: the best of several."""
    table = torch.ones(options.rows, options.dim)
    count = min(options.rows, options.samples * options.ids_per_sample)
    target = torch.empty(count, options.dim)
    seconds = []
    for _ in range(repeats):
        rows = torch.randperm(options.rows)[:count]
        started_s = time.perf_counter()
        torch.index_select(table, 0, rows, out=target)
        seconds.append(time.perf_counter() - started_s)
    return target.nbytes / min(seconds)


def seconds_of_an_id(
    options: argparse.Namespace, distinct_share: float, state_floats: int, rates: dict[str, float]
) -> float:
    row = 4 * (options.dim + state_floats)
    scattered_s = distinct_share * (4 * options.dim + 2 * row) / rates["scattered_bytes_per_s"]
    return scattered_s + 8 * options.dim / options.ids_per_sample / rates["copy_bytes_per_s"]


def measured(step: Step, options: argparse.Namespace) -> dict[str, float]:
    """IDs looked up and applied in a second, median and best of the rounds."""
    count = options.samples * options.ids_per_sample
    step(0)
    rates = []
    for _ in range(options.rounds):
        started_s = time.perf_counter()
        for index in range(options.batches):
            step(index)
        rates.append(options.batches * count / (time.perf_counter() - started_s))
    return {"rows_per_s": statistics.median(rates), "best_rows_per_s": max(rates)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=16384)
    parser.add_argument("--ids-per-sample", type=int, default=5)
    parser.add_argument("--zipf", type=float, default=1.05)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--record", action="store_true", help="write benchmarks/records/recommendation-table.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    batches = batches_of(options)
    gradient = torch.randn(options.samples, options.dim, generator=torch.Generator().manual_seed(0))
    distinct_share = statistics.mean(len(np.unique(ids)) / len(ids) for ids, _ in batches)
    rates = {"copy_bytes_per_s": copy_rate(options.threads), "scattered_bytes_per_s": scattered_rate(options)}
    print(f"{options}\ndistinct / IDs {distinct_share:.2f} · {rates}")
    found: dict[str, dict[str, float]] = {}
    for name, make, optimizer in contenders():
        try:
            step = make(optimizer, options, batches, gradient)
        except ImportError as error:
            print(f"{name:32} is not here: {error}")
            continue
        found[name] = measured(step, options)
        floats = {"row-wise Adagrad": 1, "Adagrad": options.dim}.get(name.split(", ")[1], 2 * options.dim)
        bound = 1 / seconds_of_an_id(options, distinct_share, floats, rates)
        found[name] |= {"bound_rows_per_s": bound, "share_of_bound": found[name]["rows_per_s"] / bound}
        millions = {key: f"{value / 1e6:.2f}" for key, value in found[name].items()}
        print(
            f"{name:32}{millions['rows_per_s']:>8} M rows/s, best {millions['best_rows_per_s']}, "
            f"bound {millions['bound_rows_per_s']}, share {found[name]['share_of_bound']:.0%}"
        )
    if options.record:
        keep(found, rates, distinct_share)


def keep(found: dict[str, dict[str, float]], rates: dict[str, float], distinct_share: float) -> None:
    ours = found["capstan, row-wise Adagrad"]
    peers = {name: each for name, each in found.items() if not name.startswith("capstan")}
    best = max(each["rows_per_s"] for each in peers.values())
    bars = {"share of the memory's bound": (0.5, ours["share_of_bound"])}
    bars["times the fastest peer"] = (2.0, ours["rows_per_s"] / best)
    path = write_record(
        "recommendation-table",
        claim="Rows of an embedding table are read and updated at half the speed of the memory or better.",
        machine=this_machine(device="cpu"),
        figures={name: each for name, each in found.items() if name.startswith("capstan")},
        peers=peers,
        bound=rates | {"distinct_share": distinct_share},
        bars={
            name: {"goal": goal, "reached": round(reached, 3), "holds": reached >= goal}
            for name, (goal, reached) in bars.items()
        },
    )
    print(path)


if __name__ == "__main__":
    main()
