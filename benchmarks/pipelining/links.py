"""How much faster is a step in few bits over a slow link?

    sudo python benchmarks/pipelining/links.py --rate-mbit 100 --latency-ms 10

Two stages whose compute is a pause, joined by an emulated link with real packets; full precision and changes,
by both schedules. Expected before the run, where communication dominates: 4.3 times as fast at 100 Mbit/s and
twice at 500, the fastest schedule of one against the fastest of the other; interfaces within 2 % of ledgers.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from capstan.hardware import this_machine
from capstan.pipelining.planner import Links, step_seconds
from capstan.transport import Shape
from capstan.transport.emulation import EmulatedNetwork
from record import write_record

FULL, FEW, SOME = "full precision", "changes 2/4", "changes 3/6"
VARIANTS: dict[str, dict[str, Any]] = {
    FULL: {"forward_bits": None, "backward_bits": None},
    SOME: {"forward_bits": 3, "backward_bits": 6},
    FEW: {"forward_bits": 2, "backward_bits": 4},
}
SCHEDULES = ("1f1b", "gpipe")
GOALS = {100: 4.3, 500: 2.0}


def run(network: EmulatedNetwork, told: dict[str, Any]) -> dict[str, Any]:
    """What the ranks found."""
    script = str(Path(__file__).with_name("links_rank.py"))
    ranks = [
        subprocess.Popen(
            network.command(rank, [sys.executable, script, json.dumps(told)]),
            env=os.environ | network.environment(rank) | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
        )
        for rank in range(network.num_ranks)
    ]
    output, _ = ranks[0].communicate(timeout=600)
    for each in ranks[1:]:
        each.wait(timeout=60)
    return dict(json.loads(output.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate-mbit", type=int, choices=sorted(GOALS), default=100)
    parser.add_argument("--latency-ms", type=float, default=10)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--compute-s", type=float, default=0.006)
    options = parser.parse_args()
    told = vars(options) | {"variants": VARIANTS, "schedules": SCHEDULES}
    rate, latency_s = options.rate_mbit * 1e6 / 8, options.latency_ms / 1e3
    shape = Shape(bandwidth_bytes_per_s=rate, latency_s=latency_s)
    with EmulatedNetwork(num_ranks=2, shape=shape) as network:
        found = run(network, told)
    report(found, told, Links(bandwidth_bytes_per_s=rate, latency_s=latency_s, compute_s=options.compute_s))


def report(found: dict[str, Any], told: dict[str, Any], links: Links) -> None:
    """Write the record, and print it."""
    parts = told["steps"] * told["micro_batches"]
    for name, each in found.items():
        each["ideal_s"] = step_seconds(
            name.rpartition(", ")[2],
            num_stages=2,
            num_micro_batches=told["micro_batches"],
            forward_bytes=each["ledger_bytes"][0] / parts,
            backward_bytes=each["ledger_bytes"][1] / parts,
            links=links,
        )
    fastest_s = {name: min(found[f"{name}, {each}"]["step_s"] for each in SCHEDULES) for name in VARIANTS}
    in_full_bytes = found[f"{FULL}, 1f1b"]["ledger_bytes"][0] / parts
    ratio = in_full_bytes / links.bandwidth_bytes_per_s / links.compute_s
    over = max(
        counted / ledger
        for each in found.values()
        for counted, ledger in zip(each["interface_bytes"], each["ledger_bytes"], strict=True)
    )
    speed = fastest_s[FULL] / fastest_s[FEW]
    goal = GOALS[told["rate_mbit"]]
    bars = {
        "changes 2/4: times as fast as full precision": {
            "goal": goal,
            "reached": speed,
            "holds": speed >= goal,
        },
        "interface over ledger bytes": {"goal": 1.02, "reached": over, "holds": over <= 1.02},
    }
    write_record(
        f"pipelining-link-{told['rate_mbit']}mbit-{told['latency_ms']:g}ms",
        claim="Where communication dominates, a pipeline is several times as fast in few bits.",
        machine=this_machine(),
        figures=found
        | {
            "times as fast as full precision": {
                name: fastest_s[FULL] / each for name, each in fastest_s.items()
            },
            "seconds of a message in full over seconds of a stage's compute": ratio,
        },
        bound={
            "value": {name: each["ideal_s"] for name, each in found.items()},
            "how": "the formula of docs/pipelining.md with the link's nominal rate and latency; no coding",
        },
        bars=bars,
        setting=told | {"load": f"{os.getloadavg()[0]:.1f}"},
        unfair="2 ranks and the relay share 2 cores; compute is a pause, so that it does not",
    )
    for name, each in found.items():
        print(f"{name:24} step {each['step_s']:.3f} s, ideal {each['ideal_s']:.3f} s")
    print(f"crossing over compute, in full: {ratio:.1f}; times as fast: {speed:.2f}; interface: {over:.4f}")


if __name__ == "__main__":
    main()
