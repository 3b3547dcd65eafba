"""Made-up clicks whose best possible ranking is known, and a machine whose rates are given."""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capstan.hardware import Device, Machine
from capstan.recommendation.area_under_curve import area_under_curve

CONFIG = """
label: clicked
dense: [age]
embedding: {dim: 4, optimizer: {kind: adagrad, lr: 0.1}}
slots:
  item:
  tags: {pooling: mean}
network: {top: [16]}
optimizer: {kind: adam, lr: 0.003}
"""


class Clicks(NamedTuple):
    """Files of one world of items and tags. `best_auc` is the true chances' on the test file."""

    train: Path
    test: Path
    config: Path
    best_auc: float


def write_clicks(path: Path, num_samples: int, seed: int) -> float:
    """Write samples; returns the AUC of the chances that the labels were drawn with."""
    world, generator = np.random.default_rng(0), np.random.default_rng(seed)
    item_effect, tag_effect = world.normal(0, 1.2, 300), world.normal(0, 0.6, 40)
    items = generator.zipf(1.3, num_samples) % 300
    lengths = generator.integers(0, 4, num_samples)
    tags = generator.integers(0, 40, lengths.sum())
    ends = np.r_[0, np.cumsum(lengths)]
    age = generator.normal(0, 1, num_samples).astype(np.float32)
    mean_tag = [tag_effect[tags[a:b]].mean() if b > a else 0.0 for a, b in pairwise(ends)]
    logits = item_effect[items] + 2 * np.array(mean_tag) + 0.5 * age
    labels = generator.random(num_samples) < 1 / (1 + np.exp(-logits))
    columns = {
        "item": pa.array(items),
        "tags": pa.ListArray.from_arrays(
            pa.array(ends, pa.int32()), pa.array([f"tag {each}" for each in tags])
        ),
        "age": pa.array(age),
        "clicked": pa.array(labels),
    }
    pq.write_table(pa.table(columns), path, row_group_size=700)
    return area_under_curve(labels, logits)


@pytest.fixture(scope="session")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Clicks:
    """20,000 samples to train on and 6,000 to score."""
    folder = tmp_path_factory.mktemp("clicks")
    write_clicks(folder / "train.parquet", 20_000, seed=1)
    best = write_clicks(folder / "test.parquet", 6_000, seed=2)
    (folder / "table.yaml").write_text(CONFIG)
    return Clicks(folder / "train.parquet", folder / "test.parquet", folder / "table.yaml", best)


@pytest.fixture(scope="session")
def given_machine() -> Machine:
    """Two cores, 8 GB/s of memory, 40 GFLOP/s."""
    return Machine(
        name="given",
        cores=2,
        probed_at="2026-01-01T00:00:00+00:00",
        links=(),
        devices=(
            Device(
                name="device",
                kind="cpu",
                memory_bytes=2**30,
                matmul_flops_per_s={"float32": 4e10},
                memory_bandwidth_bytes_per_s=8e9,
            ),
            Device(name="host", kind="host", memory_bytes=2**33, memory_bandwidth_bytes_per_s=8e9),
        ),
    )
