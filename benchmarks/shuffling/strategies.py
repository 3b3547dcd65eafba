"""How good is a model that was trained on label-sorted rows, by strategy; and how fast is the reading?

    python benchmarks/shuffling/strategies.py --adult FOLDER --figure docs/shuffling.svg --record

Question: does a tenth of the blocks as buffer train as well as a full shuffle, and is it read as fast as in
order? FOLDER has adult.data and adult.test of the UCI repository; digits come with scikit-learn; a third
table is generated. Each is sorted by its label and cut into blocks of at most 1 % of its rows. Every
strategy trains with the verb's defaults, three seeds each; scores are of test rows in percent.

The reading: one Parquet file, in order and by CorgiPile in turns, dropped from the page cache before each.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from capstan.hardware import this_machine
from capstan.shuffling import (
    Batches,
    Order,
    Share,
    ShuffledDataset,
    ShuffledLoader,
    Training,
    open_source,
    train,
)
from capstan.storage import NumpyBlocks

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import write_record

STRATEGIES = ("full", "corgipile", "reservoir", "window", "block", "none")
SEEDS = (0, 1, 2)
_ACCEPTED = {
    "cnn": "1,397 digits in blocks of 13: a buffer lacks some of ten classes; larger data are to be tried",
    "rows": "putting rows in random places of a buffer takes longer than copying them; to be mended",
    "other": "measured so",
}
Table = dict[str, np.ndarray]


def adult(folder: Path) -> tuple[Table, Table]:
    """The census rows: five numbers, and six categories as columns of 0 and 1."""
    parts = []
    for name in ("adult.data", "adult.test"):
        rows = [line.split(",") for line in (folder / name).read_text().splitlines()]
        parts.append([[cell.strip() for cell in row] for row in rows if len(row) == 15 and row[0] != "age"])
    categories = {at: sorted({row[at] for row in parts[0]}) for at in (1, 5, 6, 7, 8, 9)}

    def encoded(rows: list[list[str]]) -> Table:
        table = {f"n{at}": np.array([float(row[at]) for row in rows]) for at in (0, 4, 10, 11, 12)}
        for at, values in categories.items():
            table |= {
                f"c{at}{value}": np.array([float(row[at] == value) for row in rows]) for value in values
            }
        return table | {"y": np.array([int(">50K" in row[14]) for row in rows])}

    return encoded(parts[0]), encoded(parts[1])


def digits() -> tuple[Table, Table]:
    """scikit-learn's 1,797 digits, 400 of them for testing."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    order = np.random.default_rng(0).permutation(len(loaded.target))
    table = {"x": loaded.data, "y": loaded.target}
    return tuple(
        {name: column[part] for name, column in table.items()} for part in (order[400:], order[:400])
    )


def generated(rows: int = 60_000) -> tuple[Table, Table]:
    """Two overlapping normal clouds of 20 features."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, rows)
    x = rng.normal(size=(rows, 20)) + (y[:, None] - 0.5) * 0.5
    table = {"x": x.astype(np.float32), "y": y}
    half = rows // 2
    return {n: c[:half] for n, c in table.items()}, {n: c[half:] for n, c in table.items()}


def curves(tables: tuple[Table, Table], model: str, epochs: int) -> dict[str, list[list[float]]]:
    """For each strategy and seed the test accuracy after every epoch, in percent."""
    rows, test = tables
    order = np.argsort(rows["y"], kind="stable")
    num_rows = len(order)
    source = NumpyBlocks({n: c[order] for n, c in rows.items()}, rows_per_block=max(1, num_rows // 100))
    tested = NumpyBlocks(test, rows_per_block=len(test["y"]))
    found: dict[str, list[list[float]]] = {}
    for strategy in STRATEGIES:
        for seed in SEEDS:
            training = Training(
                label="y",
                model=model,
                strategy=strategy,
                buffer_blocks=round(source.num_blocks / 10),
                epochs=epochs,
                seed=seed,
            )
            done = train(source, training, test=tested)
            found.setdefault(strategy, []).append([100 * each.score["accuracy"] for each in done.reports])
    return found


def network_curves(tables: tuple[Table, Table], epochs: int) -> dict[str, list[list[float]]]:
    """The same for a small convolutional network on the digits, by the PyTorch loader and plain SGD."""
    import torch
    from torch import nn

    rows, test = tables
    order = np.argsort(rows["y"], kind="stable")
    columns = {"x": rows["x"][order].astype(np.float32) / 16, "y": rows["y"][order]}
    source = NumpyBlocks(columns, rows_per_block=max(1, len(order) // 100))
    x, y = torch.tensor(test["x"], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(test["y"])
    found: dict[str, list[list[float]]] = {}
    for strategy in STRATEGIES:
        for seed in SEEDS:
            torch.manual_seed(seed)
            model = nn.Sequential(
                *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
                *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10)),
            )
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            loader = ShuffledLoader(
                ShuffledDataset(source, batch_size=16, strategy=strategy, seed=seed, num_streams=1)
            )
            curve = []
            for epoch in range(epochs):
                for group in optimizer.param_groups:
                    group["lr"] = 0.05 * (1 - epoch / epochs)
                for batch in loader:
                    loss = nn.functional.cross_entropy(model(batch["x"].reshape(-1, 1, 8, 8)), batch["y"])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                with torch.no_grad():
                    curve.append(100 * float((model(x).argmax(1) == y).float().mean()))
            found.setdefault(strategy, []).append(curve)
    return found


def reading(folder: Path, rows: int, repeats: int) -> dict[str, float]:
    """Rows a second of an epoch that is only read, by order; medians of turns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "rows.parquet"
    rng = np.random.default_rng(0)
    per_group = rows // 200
    with pq.ParquetWriter(path, pa.schema([(f"f{at}", pa.float32()) for at in range(28)])) as writer:
        for _ in range(200):
            values = {f"f{at}": rng.normal(size=per_group).astype(np.float32) for at in range(28)}
            writer.write_table(pa.table(values), row_group_size=per_group)
    source = open_source(path)
    times: dict[str, list[float]] = {"none": [], "corgipile": []}
    for turn in range(repeats + 1):
        for strategy, taken in times.items():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            order = Order(sizes=source.sizes, seed=turn, strategy=strategy, buffer_blocks=20)
            started = time.perf_counter()
            with Batches(source, Share(order=order, batch_size=1024)) as batches:
                for _ in batches:
                    pass
            if turn:  # the first turn warms up
                taken.append(time.perf_counter() - started)
    told = {name: source.num_blocks * per_group / statistics.median(taken) for name, taken in times.items()}
    return told | {"file_bytes": float(path.stat().st_size)}


def draw(found: dict[str, dict[str, list[list[float]]]], place: Path) -> None:
    """One panel a table and model: medians of the seeds, the band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "capstan"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(3.1 * len(found), 3.0), constrained_layout=True)
    for panel, (title, by_strategy) in zip(np.atleast_1d(panels), found.items(), strict=True):
        for strategy, runs in by_strategy.items():
            epochs = np.arange(1, len(runs[0]) + 1)
            (line,) = panel.plot(epochs, np.median(runs, axis=0), marker=".", label=strategy)
            panel.fill_between(epochs, np.min(runs, 0), np.max(runs, 0), alpha=0.15, color=line.get_color())
        panel.set(title=title, xlabel="epoch")
    np.atleast_1d(panels)[0].set_ylabel("test accuracy, %")
    np.atleast_1d(panels)[-1].legend(fontsize=7)
    figure.savefig(place, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adult", type=Path, help="folder with adult.data and adult.test")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2_000_000, help="of the file that is read")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    tables: dict[str, Any] = {"generated": generated(), "digits": digits()}
    if asked.adult:
        tables["adult"] = adult(asked.adult)
    found, figures, bars = {}, {}, {}
    for name, both in tables.items():
        for model in ("softmax", "cnn") if name == "digits" else ("logistic", "svm", "softmax"):
            made = (
                network_curves(both, 3 * asked.epochs)
                if model == "cnn"
                else curves(both, model, asked.epochs)
            )
            by_strategy = found[f"{name}, {model}"] = made
            last = {strategy: [run[-1] for run in runs] for strategy, runs in by_strategy.items()}
            for strategy, scores in last.items():
                spread = [round(min(scores), 2), round(max(scores), 2)]
                value = round(statistics.mean(scores), 2)
                figures[f"{name} {model} {strategy}"] = {"value": value, "unit": "%", "spread": spread}
            gap = max(abs(a - b) for a, b in zip(last["corgipile"], last["full"], strict=True))
            bars[f"{name} {model}: points from a full shuffle, worst seed"] = {
                "goal": 0.5,
                "reached": round(gap, 2),
                "holds": gap <= 0.5,
            }
            print(name, model, {strategy: np.round(scores, 2).tolist() for strategy, scores in last.items()})
    if asked.figure:
        draw({title: found[title] for title in found if "svm" in title or "digits" in title}, asked.figure)
    with tempfile.TemporaryDirectory() as folder:
        rates = reading(Path(folder), asked.rows, asked.repeats)
    share = rates["corgipile"] / rates["none"]
    print(f"reading: {rates}, corgipile / in order = {share:.3f}")
    bars["rows a second, corgipile / in order"] = {
        "goal": 0.95,
        "reached": round(share, 3),
        "holds": share >= 0.95,
    }
    for name in ("none", "corgipile"):
        figures[f"reading {name}"] = {"value": round(rates[name]), "unit": "rows/s", "spread": None}
    for name, bar in bars.items():
        if not bar["holds"]:
            bar["accepted"] = _ACCEPTED["cnn" if "cnn" in name else "rows" if "rows" in name else "other"]
    if asked.record:
        write_record(
            "shuffling-strategies",
            claim="A buffer of a tenth of the blocks trains label-sorted rows as well as a full shuffle.",
            machine=this_machine(device="cpu"),
            figures=figures | {"share": {"value": round(share, 3), "unit": "", "spread": None}},
            bound={"what": "accuracy on fully shuffled rows; rows/s of the same decoder in order"},
            bars=bars,
            file_bytes=int(rates["file_bytes"]),
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
