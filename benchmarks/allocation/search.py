"""What do the searches find, and how long do they take?

    python benchmarks/allocation/search.py

The paper's five settings with its own constants, each search from ten seeds; then 256 devices in 32 made-up
regions against long annealing, from a random and from the contiguous layout, and how search time grows.
Expected before the run: the evolutionary search reaches the best known cost of each setting from every seed
in under a second; random ranks and annealing of about the same time do not, and in the spot setting annealing
never leaves 49.504 s.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np

from capstan.allocation import (
    CostModel,
    TrainingTask,
    contiguous,
    pair_seconds,
    regions_on_a_globe,
    search_annealing,
    search_evolution,
    strided,
)
from capstan.allocation.cost import as_listed_s
from capstan.allocation.evolution import random_layouts
from capstan.hardware import Cluster, scenario, this_machine
from record import write_record

BEST_KNOWN_S = {
    "datacenter": 3.440,
    "spot": 31.634,
    "two-universities": 16.087,
    "regional": 34.802,
    "worldwide": 49.218,
}
PRINTED_S = 1e-3
STAGES = 8
Search = Callable[[CostModel, np.random.Generator], Any]


def model_of(cluster: Cluster, cost_model: str = "paper") -> CostModel:
    replicas = len(cluster.names) // STAGES
    tasklet = TrainingTask().tasklet(stages=STAGES, replicas=replicas, cost_model=cost_model)
    return CostModel(pair_seconds(cluster, tasklet, replicas=replicas))


def timed(cluster: Cluster, search: Search, seed: int, cost_model: str = "paper") -> tuple[float, float]:
    """Cost of what is found, and seconds from the cluster to the layout."""
    begun = time.perf_counter()
    model = model_of(cluster, cost_model)
    layout = search(model, np.random.default_rng(seed))
    seconds = time.perf_counter() - begun
    return float(model.total_s(layout[None])[0]), seconds


def evolution(model: CostModel, rng: np.random.Generator) -> Any:
    return search_evolution(model, stages=STAGES, rng=rng)


def annealing(steps: int, start: Any = None) -> Search:
    return lambda model, rng: search_annealing(model, stages=STAGES, rng=rng, steps=steps, start=start)


def summary(runs: list[tuple[float, float]]) -> dict[str, Any]:
    costs, seconds = [cost for cost, _ in runs], [second for _, second in runs]
    return {
        "cost_s": costs,
        "cost_s_worst": max(costs),
        "search_s_median": statistics.median(seconds),
        "search_s_worst": max(seconds),
    }


def settings(seeds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in BEST_KNOWN_S:
        cluster = scenario(name)
        pairs = model_of(cluster).pairs
        drawn = random_layouts(64, stages=STAGES, count=5000, rng=np.random.default_rng(0))
        listed = as_listed_s(pairs, drawn)
        ordered = model_of(cluster).total_s(drawn[:1000])
        found[name] = {
            "evolution": summary([timed(cluster, evolution, seed) for seed in range(seeds)]),
            "annealing, 1,000 steps": summary(
                [timed(cluster, annealing(1000), seed) for seed in range(seeds)]
            ),
            "random, 5,000 as listed": {"cost_s_mean": listed.mean(), "cost_s_best": listed.min()},
            "random, 1,000 in the best order": {"cost_s_mean": ordered.mean(), "cost_s_best": ordered.min()},
        }
        print(name, found[name]["evolution"]["cost_s_worst"], found[name]["evolution"]["search_s_worst"])
    return found


def globe(annealing_s: float) -> dict[str, Any]:
    """256 devices in 32 regions: evolution, hand layouts, and annealing for about `annealing_s` from each of
    two starts: a random layout, and the contiguous one."""
    cluster = regions_on_a_globe(32, devices_per_region=8)
    model = model_of(cluster, "corrected")
    hand = {"strided": strided(256, stages=STAGES), "contiguous": contiguous(256, stages=STAGES)}
    found: dict[str, Any] = {
        name: {"cost_s": float(model.total_s(layout.array[None])[0])} for name, layout in hand.items()
    }
    runs = [timed(cluster, evolution, seed, "corrected") for seed in range(3)]
    found["evolution"] = summary(runs)
    for name, start in (("random", None), ("contiguous", hand["contiguous"].array)):
        _, trial_s = timed(cluster, annealing(2000, start), 0, "corrected")
        steps = max(2000, round(2000 * annealing_s / trial_s))
        cost, seconds = timed(cluster, annealing(steps, start), 0, "corrected")
        found[f"annealing from {name}"] = {"cost_s": cost, "steps": steps, "search_s": seconds}
        print(name, found[f"annealing from {name}"])
    return found


def growth() -> dict[str, Any]:
    """Search seconds of 64 to 1,024 devices, 8 in each region."""
    found = {}
    for count in (64, 128, 256, 512, 1024):
        cluster = regions_on_a_globe(count // 8, devices_per_region=8)
        cost, seconds = timed(cluster, evolution, 0, "corrected")
        found[str(count)] = {"cost_s": cost, "search_s": seconds}
        print(count, found[str(count)])
    return found


def bars_of(found: dict[str, Any], globe_found: dict[str, Any]) -> dict[str, Any]:
    bars: dict[str, Any] = {}

    def at_most(name: str, goal: float, reached: float) -> None:
        bars[name] = {"goal": goal, "reached": round(reached, 6), "holds": reached <= goal}

    for name, goal in BEST_KNOWN_S.items():
        ours = found[name]["evolution"]
        at_most(f"{name}: dearest of all seeds, s", goal + PRINTED_S, ours["cost_s_worst"])
        at_most(f"{name}: longest search, s", 1.0, ours["search_s_worst"])
    ours = globe_found["evolution"]
    at_most("256 devices in 32 regions: longest search, s", 30.0, ours["search_s_worst"])
    for start in ("random", "contiguous"):
        ratio = ours["cost_s_worst"] / globe_found[f"annealing from {start}"]["cost_s"]
        at_most(f"256 devices in 32 regions: cost against annealing from {start}", 1.05, ratio)
    return bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--annealing-s", type=float, default=600.0)
    options = parser.parse_args()
    found, grown, made_up = settings(options.seeds), growth(), globe(options.annealing_s)
    bars = bars_of(found, made_up)
    write_record(
        "allocation-search",
        claim="The search reaches the best known cost of the paper's settings from every seed, in under 1 s.",
        machine=this_machine(),
        figures={
            "settings": {name: each["evolution"] for name, each in found.items()},
            "growth, devices": grown,
            "256 devices in 32 regions": made_up,
        },
        peers={
            name: {peer: told for peer, told in each.items() if peer != "evolution"}
            for name, each in found.items()
        },
        bound={
            "value": BEST_KNOWN_S,
            "how": "settings 0 to 3: proven optimal by counting dear edges; worldwide: best known",
        },
        bars=bars,
        setting={"seeds": options.seeds, "stages": STAGES, "threads": 1, "annealing_s": options.annealing_s},
    )
    for name, bar in bars.items():
        print(f"{'holds ' if bar['holds'] else 'MISSED'} {name}: {bar['reached']} (goal {bar['goal']})")


if __name__ == "__main__":
    main()
