"""What does it cost in accuracy that only a tenth of the activations crosses the cut?

    python benchmarks/federation/accuracy.py --record --figure docs/federation-accuracy.svg

scikit-learn's digits on 8 devices, dealt evenly (iid) and by Dirichlet(0.5) shares of each label. For each
seed three arms begin with the same weights, samples and deal: central training of the uncut network on the
pooled samples, the split network with everything sent as float32, and with a tenth sent as float16 and
gradients on the support. Batches are about 64 samples in all, divided over devices in proportion to what they
have. Differences are paired by seed; the interval is Student's at 95 %.
"""

import argparse
import statistics
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from capstan.federation import TopK, Wire
from capstan.federation.data_files import Samples, split_off_test
from capstan.federation.job import SplitJob
from capstan.federation.members import CutNetwork, DeviceData
from capstan.federation.partition import balanced_batches, partition
from capstan.federation.schedule import Settings

DEVICES, TOTAL, RATE, MOMENTUM = 8, 64, 0.05, 0.9
ARMS = ("central", "dense split", "keep 0.1")
WIRES = {
    "dense split": Wire(sparsifier=None, value_type="float32"),
    "keep 0.1": Wire(sparsifier=TopK(keep=0.1)),
}


def network(seed: int) -> CutNetwork:
    """A bottom of one convolution (d = 1152) and a top of one more."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        top = [nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
        return CutNetwork(
            bottom=nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU()),
            top=nn.Sequential(*top, nn.Flatten(), nn.Linear(288, 10)),
            num_classes=10,
        )


def central(cut: CutNetwork, train: Samples, test: Samples, epochs: int, seed: int) -> list[float]:
    """Accuracy after each epoch of the uncut network on all samples together."""
    model = nn.Sequential(deepcopy(cut.bottom), deepcopy(cut.top))
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    inputs, labels = torch.from_numpy(train.inputs), torch.from_numpy(train.labels)
    curve = []
    for epoch in range(epochs):
        model.train()
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(labels)))
        for rows in order.split(TOTAL):
            optimiser.zero_grad()
            F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimiser.step()
        model.eval()
        with torch.no_grad():
            found = model(torch.from_numpy(test.inputs)).argmax(1).numpy()
        curve.append(float((found == test.labels).mean()))
    return curve


def split(
    cut: CutNetwork, train: Samples, test: Samples, arm: str, scheme: str, epochs: int, seed: int
) -> tuple[list[float], SplitJob]:
    """The same of the split network."""
    parts = partition(train.labels, DEVICES, scheme=scheme, alpha=0.5, seed=seed)
    batches = balanced_batches(list(map(len, parts)), TOTAL)
    devices = []
    for part, batch in zip(map(train.take, parts), batches, strict=True):
        inputs, labels = torch.from_numpy(part.inputs), torch.from_numpy(part.labels)
        devices.append(DeviceData(inputs=inputs, labels=labels, batch_size=batch))
    settings = Settings(learning_rate=RATE, momentum=MOMENTUM, seed=seed)
    job = SplitJob(network=cut, devices=devices, wire=WIRES[arm], settings=settings)
    curve = []
    for _ in range(epochs):
        job.run_epoch()
        curve.append(job.accuracy(torch.from_numpy(test.inputs), torch.from_numpy(test.labels)))
    return curve, job


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean, lower and upper end of Student's 95 % interval."""
    mean = statistics.mean(differences)
    half = (
        float(stats.t.ppf(0.975, len(differences) - 1))
        * statistics.stdev(differences)
        / len(differences) ** 0.5
    )
    return mean, mean - half, mean + half


def measure(seeds: int, epochs: int) -> dict[str, dict[str, list[list[float]]]]:
    """For each scheme and arm the curve of every seed."""
    digits = load_digits()
    inputs = (digits.images[:, None] / 16).astype(np.float32)
    samples = Samples(inputs, digits.target.astype(np.int64))
    found: dict[str, dict[str, list[list[float]]]] = {
        scheme: {arm: [] for arm in ARMS} for scheme in ("iid", "dirichlet")
    }
    for seed in range(seeds):
        train, test = split_off_test(samples, 0.3, seed)
        cut = network(seed)
        pooled = central(cut, train, test, epochs, seed)
        for scheme, curves in found.items():
            curves["central"].append(pooled)
            for arm in WIRES:
                curve, job = split(cut, train, test, arm, scheme, epochs, seed)
                curves[arm].append(curve)
                sent = job.ledger.traffic
                assert sent == SplitJob.forecast(_unstarted(job), epochs).traffic
            print(
                f"seed {seed} {scheme}: " + ", ".join(f"{arm} {curves[arm][-1][-1]:.4f}" for arm in ARMS),
                flush=True,
            )
    return found


def _unstarted(job: SplitJob) -> SplitJob:
    data = [device.data for device in job.devices]
    return SplitJob(network=job.network, devices=data, wire=job.wire, settings=job.settings)


def figures(found: dict[str, dict[str, list[list[float]]]]) -> dict[str, dict[str, object]]:
    """Means of the last epoch and paired differences."""
    told: dict[str, dict[str, object]] = {}
    for scheme, curves in found.items():
        last = {arm: [curve[-1] for curve in curves[arm]] for arm in ARMS}
        told[scheme] = {"accuracy": {arm: statistics.mean(values) for arm, values in last.items()}}
        for other in ("dense split", "central"):
            pairs = [ours - theirs for ours, theirs in zip(last["keep 0.1"], last[other], strict=True)]
            mean, low, high = interval(pairs)
            told[scheme][f"keep 0.1 less {other}"] = {"mean": mean, "low": low, "high": high}
        told[scheme]["accuracy_by_seed"] = last
        told[scheme]["curves"] = {arm: np.mean(curves[arm], axis=0).round(4).tolist() for arm in ARMS}
    return told


def draw(told: dict[str, dict[str, object]], path: Path) -> None:
    """The mean curves as a small SVG."""
    colours = {"central": "#888888", "dense split": "#1f77b4", "keep 0.1": "#d62728"}
    low, width, height, left = 0.5, 260, 180, 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * (width + left) + 20} {height + 70}" '
        'font-family="sans-serif" font-size="11">'
    ]
    for at, (scheme, figures_of) in enumerate(told.items()):
        x0 = left + at * (width + left)
        parts.append(f'<text x="{x0}" y="14">{"iid" if scheme == "iid" else "Dirichlet(0.5)"}</text>')
        for tick in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
            y = 24 + height * (1 - (tick - low) / (1 - low))
            parts.append(f'<path d="M{x0} {y:.1f}h{width}" stroke="#dddddd"/>')
            parts.append(f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.1f}</text>')
        for arm, curve in figures_of["curves"].items():  # type: ignore[attr-defined]
            points = " ".join(
                f"{x0 + width * number / max(1, len(curve) - 1):.1f},"
                f"{24 + height * (1 - (max(low, value) - low) / (1 - low)):.1f}"
                for number, value in enumerate(curve)
            )
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{colours[arm]}" stroke-width="1.8"/>'
            )
        for number in range(len(curve)):
            x = x0 + width * number / max(1, len(curve) - 1)
            parts.append(f'<text x="{x:.1f}" y="{height + 40}" text-anchor="middle">{number + 1}</text>')
    for at, (arm, colour) in enumerate(colours.items()):
        x = left + at * 110
        parts.append(f'<path d="M{x} {height + 58}h18" stroke="{colour}" stroke-width="1.8"/>')
        parts.append(f'<text x="{x + 24}" y="{height + 62}">{arm}</text>')
    parts.append(f'<text x="{left + 340}" y="{height + 62}">test accuracy after each epoch</text></svg>')
    path.write_text("\n".join(parts) + "\n")


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--seeds", type=int, default=10)
    asked.add_argument("--epochs", type=int, default=10)
    asked.add_argument("--record", action="store_true")
    asked.add_argument("--figure", type=Path)
    told = asked.parse_args()
    torch.set_num_threads(1)
    found = figures(measure(told.seeds, told.epochs))
    for scheme, values in found.items():
        print(scheme, {name: value for name, value in values.items() if "less" in name})
    if told.figure:
        draw(found, told.figure)
    if told.record:
        _write(found, told.seeds, told.epochs)


def _write(found: dict[str, dict[str, object]], seeds: int, epochs: int) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from capstan.hardware import this_machine
    from record import write_record

    bars = {}
    for scheme, values in found.items():
        for other, goal in (("dense split", -0.01), ("central", -0.02)):
            mean = values[f"keep 0.1 less {other}"]["mean"]  # type: ignore[index]
            bars[f"{scheme}: mean difference to {other}"] = {
                "goal": f">= {goal}",
                "reached": mean,
                "holds": mean >= goal,
            }
    write_record(
        "federation-accuracy",
        claim=f"A tenth of the activations costs little: digits, 8 devices, {seeds} seeds, {epochs} epochs",
        machine=this_machine(),
        figures=found,
        bound={"test_samples": 539, "one_sample": 1 / 539},
        bars=bars,
    )


if __name__ == "__main__":
    main()
