"""Does a pipeline train as well in a few bits?

    python benchmarks/pipelining/convergence.py

The complete set-up of a small reproduction of AC-SGD: a decoder of 4 layers and 64 dimensions on 128
sequences of a noisy second-order Markov chain, 41 epochs. Expected before the run: changes
of 3 bits with gradients of 6 within 0.02 of full precision, direct quantisation at the same bits clearly
worse.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from capstan.hardware import this_machine
from record import write_record

PICTURE = Path(__file__).parents[2] / "docs" / "pipelining-convergence.svg"
FULL = "full precision"
VARIANTS: dict[str, dict[str, Any]] = {
    FULL: {"forward_bits": None, "backward_bits": None},
    "changes 3/6": {"forward_bits": 3, "backward_bits": 6},
    "direct 3/6": {"forward_bits": 3, "backward_bits": 6, "changes": False},
    "changes 2/4": {"forward_bits": 2, "backward_bits": 4},
    "direct 2/4": {"forward_bits": 2, "backward_bits": 4, "changes": False},
    "changes 2/4, symmetric": {"forward_bits": 2, "backward_bits": 4, "symmetric": True},
    "changes 2/4, stochastic": {"forward_bits": 2, "backward_bits": 4, "stochastic": True},
}
COLOURS = ("#222222", "#0b6fb8", "#e07b00", "#3a9d5d", "#c23b3b", "#7a52b3", "#888800")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=41)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    config = {
        "variants": VARIANTS,
        "epochs": options.epochs,
        "seeds": list(range(1, options.seeds + 1)),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={options.stages}"]
    command += [str(Path(__file__).with_name("convergence_rank.py")), json.dumps(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True, timeout=3600)
    report(json.loads(done.stdout.splitlines()[-1]), vars(options))


def report(found: dict[str, list[dict[str, list[float]]]], setting: dict[str, Any]) -> None:
    """Write the record and the picture, and print the table."""
    last = {name: statistics.mean(run["loss"][-1] for run in runs) for name, runs in found.items()}
    worst = {name: max(run["loss"][-1] for run in runs) for name, runs in found.items()}
    wire = {name: runs[0]["wire_bytes"][-1] for name, runs in found.items()}
    bars = {
        "changes 3/6: loss above full precision, worst seed": _bar(worst["changes 3/6"] - last[FULL], 0.02),
        "changes 2/4: loss above full precision, worst seed": _bar(worst["changes 2/4"] - last[FULL], 0.02),
        "direct 3/6: loss against changes 3/6": _bar(
            last["direct 3/6"] / last["changes 3/6"], 1.5, is_least=True
        ),
        "direct 2/4: loss against changes 2/4": _bar(
            last["direct 2/4"] / last["changes 2/4"], 3.0, is_least=True
        ),
        "changes 2/4: times fewer bytes an epoch": _bar(wire[FULL] / wire["changes 2/4"], 8.0, is_least=True),
    }
    write_record(
        "pipelining-convergence",
        claim="A pipeline that sends changes of activations in few bits trains as well as in full precision.",
        machine=this_machine(),
        figures=found,
        bound={
            "value": last[FULL],
            "how": "the mean last loss in full precision with the same data and seeds",
        },
        bars=bars,
        setting=setting | {"batch": 16, "micro_batches": 4, "optimizer": "AdamW 2e-3", "clip": 1.0},
    )
    PICTURE.write_text(picture({name: runs[0]["loss"] for name, runs in found.items()}))
    print("| messages | loss after the last epoch, by seed | bytes in the first epoch | in a later one |")
    print("| --- | --- | --- | --- |")
    for name, runs in found.items():
        losses = ", ".join(f"{run['loss'][-1]:.4f}" for run in runs)
        print(f"| {name} | {losses} | {runs[0]['wire_bytes'][0]:,} | {wire[name]:,} |")
    for name, bar in bars.items():
        print(f"{'holds ' if bar['holds'] else 'MISSED'} {name}: {bar['reached']} (goal {bar['goal']})")


def _bar(reached: float, goal: float, *, is_least: bool = False) -> dict[str, Any]:
    return {
        "goal": goal,
        "reached": round(reached, 4),
        "holds": reached >= goal if is_least else reached <= goal,
    }


def picture(curves: dict[str, list[float]]) -> str:
    """Losses by epoch as an SVG of polylines."""
    width, height, left, top = 560, 300, 40, 16
    highest = max(max(curve) for curve in curves.values())
    epochs = max(len(curve) for curve in curves.values())

    def at(epoch: float, loss: float) -> str:
        across, down = epoch / max(1, epochs - 1), 1 - loss / highest
        return f"{left + across * (width - left - 156):.1f},{top + down * (height - top - 34):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<polyline points="{at(0, highest)} {at(0, 0)} {at(epochs - 1, 0)}" fill="none" stroke="#888"/>',
        f'<text x="{left}" y="{height - 8}">epochs, 1 to {epochs}</text>',
    ]
    for loss in range(int(highest) + 1):
        x, y = at(0, loss).split(",")
        parts.append(f'<text x="{float(x) - 14}" y="{float(y) + 4}">{loss}</text>')
    for index, (name, curve) in enumerate(curves.items()):
        colour, y = COLOURS[index % len(COLOURS)], top + 14 + 18 * index
        points = " ".join(at(epoch, loss) for epoch, loss in enumerate(curve))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        parts.append(f'<text x="{width - 146}" y="{y}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
