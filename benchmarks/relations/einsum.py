"""An einsum in memory beside torch.einsum, and one of operands four times the budget beside Dask array.

    python benchmarks/relations/einsum.py --size 4096 --dask-python ENVIRONMENT/bin/python --record

Question: does planning cost anything when all fits, and what does a memory budget cost when it does not?
Each run out of core is a process of its own; its peak is the growth of its resident memory over the imports.
The sides of a comparison take turns, `--repeats` times, and the medians are compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

CASES = {
    "ij,jk->ik": [(1500, 1500), (1500, 1500)],
    "bij,bjk->bik": [(16, 400, 400), (16, 400, 400)],
    "ij,jk,kl->il": [(1200, 1000), (1000, 1100), (1100, 900)],
}
GOALS = {"dask": 2.0, "dask_optimized": 1.0}
_PEAK = """
def resident(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts again from what is resident now
before = resident("VmRSS")
"""
_OURS = """
import sys, time
from capstan import relations
a, b, c, memory, threads = sys.argv[1:]
PEAKstarted = time.perf_counter()
operands = map(relations.open_tensor, (a, b))
relations.einsum("ij,jk->ik", *operands).compute(memory=int(memory), threads=int(threads), output=c)
seconds = time.perf_counter() - started
print(seconds, resident("VmHWM") - before)
"""
_DASK = """
import sys, time
import dask, numpy as np
import dask.array as da
a, b, c, chunk, threads = sys.argv[1:]
PEAKstarted = time.perf_counter()
left, right = (da.from_array(np.load(path, mmap_mode="r"), chunks=int(chunk)) for path in (a, b))
result = da.einsum("ij,jk->ik", left, right, optimize=OPTIMIZE)
target = np.lib.format.open_memmap(c, mode="w+", dtype=result.dtype, shape=result.shape)
with dask.config.set(scheduler="threads", num_workers=int(threads)):
    da.store(result, target)
target.flush()
seconds = time.perf_counter() - started
print(seconds, resident("VmHWM") - before)
"""


def in_memory(repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of torch.einsum and of ours, in turns, on torch tensors."""
    import torch

    from capstan import relations

    found = {}
    for text, shapes in CASES.items():
        tensors = [torch.randn(*shape) for shape in shapes]
        sides: dict[str, Callable[[], object]] = {
            "torch_s": lambda text=text, tensors=tensors: torch.einsum(text, *tensors),
            "capstan_s": lambda text=text, tensors=tensors: relations.einsum(text, *tensors).compute(
                memory="2GiB"
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(repeats + 1):
            for name, side in sides.items():
                started = time.perf_counter()
                side()
                times[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
        found[text] = medians | {"ratio": medians["capstan_s"] / medians["torch_s"]}
    return found


def out_of_core(
    size: int, threads: int, repeats: int, dask_python: str | None
) -> dict[str, dict[str, list[float]]]:
    """Seconds and peak bytes of every run in turns; the budget is a quarter of the operands."""
    budget = 2 * size * size * 4 // 4
    with tempfile.TemporaryDirectory() as folder:
        a, b, c = (str(Path(folder) / f"{name}.npy") for name in "abc")
        rng = np.random.default_rng(0)
        for path in (a, b):
            np.save(path, rng.standard_normal((size, size), dtype=np.float32))
        sides = {
            "capstan": [
                sys.executable,
                "-c",
                _OURS.replace("PEAK", _PEAK),
                a,
                b,
                c,
                str(budget),
                str(threads),
            ]
        }
        if dask_python:
            # Squares of an eighth: Dask holds several at once and chooses nothing itself. Its default calls
            # numpy.einsum without BLAS; optimize=True is Dask at its best.
            for name, optimize in {"dask": "False", "dask_optimized": "True"}.items():
                script = _DASK.replace("PEAK", _PEAK).replace("OPTIMIZE", optimize)
                sides[name] = [dask_python, "-c", script, a, b, c, str(size // 8), str(threads)]
        found: dict[str, dict[str, list[float]]] = {name: {"s": [], "peak_bytes": []} for name in sides}
        for _ in range(repeats):
            for name, command in sides.items():
                seconds, peak = _run(command)
                found[name]["s"].append(seconds)
                found[name]["peak_bytes"].append(peak)
    return found


def _run(command: list[str]) -> tuple[float, float]:
    # One BLAS thread a worker, for both sides: workers are what `threads` counts.
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | one)
    seconds, peak = map(float, done.stdout.split())
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the matrices on disk")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dask-python", help="a Python that has dask[array]")
    parser.add_argument(
        "--record", action="store_true", help="write benchmarks/records/relations-einsum.json"
    )
    options = parser.parse_args()
    fits = in_memory(options.repeats)
    disk = out_of_core(options.size, options.threads, options.repeats, options.dask_python)
    print(json.dumps({"in_memory": fits, "out_of_core": disk}, indent=1))
    if options.record:
        _record(fits, disk, options)


def _record(fits: dict, disk: dict, options: argparse.Namespace) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from capstan.hardware import this_machine
    from record import write_record

    budget = 2 * options.size**2 * 4 // 4
    worst = max(each["ratio"] for each in fits.values())
    ours = statistics.median(disk["capstan"]["s"])
    peak = max(disk["capstan"]["peak_bytes"])
    bars = {
        "in memory": {"goal": "<= 1.15 x torch.einsum", "reached": round(worst, 3), "holds": worst <= 1.15},
        "peak": {
            "goal": "resident memory grows by at most the budget",
            "reached": round(peak / budget, 3),
            "holds": peak <= budget,
        },
    }
    peers = {name: runs for name, runs in disk.items() if name != "capstan"}
    for name, runs in peers.items():
        ratio = statistics.median(runs["s"]) / ours
        bars[name] = {
            "goal": f">= {GOALS[name]} x as fast",
            "reached": round(ratio, 3),
            "holds": ratio >= GOALS[name],
        }
    write_record(
        "relations-einsum",
        claim="a memory budget holds, and costs little beside the plain contraction",
        machine=this_machine(),
        figures={
            "in_memory": fits,
            "out_of_core": {"median_s": ours, "budget_bytes": budget, **disk["capstan"]},
        },
        peers=peers,
        bound={"products": options.size**3, "unit": "multiplications of float32, two cores"},
        bars=bars,
        size=options.size,
        threads=options.threads,
    )


if __name__ == "__main__":
    main()
