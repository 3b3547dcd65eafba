"""What training will read, write and take, counted from the IDs before anything is trained."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from capstan.errors import DoesNotFit, InputError
from capstan.hardware import Machine
from capstan.plans import Alternative, Choice, Phase, Plan, Traffic, bytes_text, link_name
from capstan.recommendation.click_log import Samples
from capstan.recommendation.ranking_network import multiplications
from capstan.recommendation.table import index_bytes, row_bytes
from capstan.recommendation.training_config import RecommenderConfig, row_optimizer

TO_NETWORK, TO_TABLE = link_name("tables", "network"), link_name("network", "tables")
PROCESSOR = "processor"
_FLOPS_PER_MULTIPLICATION = 6  # two forward, two for the input's gradient, two for the weight's


@dataclass(frozen=True, kw_only=True)
class Workload:
    """An epoch counted: `distinct` IDs of each batch added up, and `rows`, distinct in all, by slot."""

    num_samples: int
    num_batches: int
    last_batch: int
    num_ids: dict[str, int]
    distinct: dict[str, int]
    rows: dict[str, int]


def count_workload(batches: Iterable[Samples], slots: list[str]) -> Workload:
    """Read an epoch's IDs once, in the batches that will be trained."""
    num_samples = num_batches = last_batch = 0
    num_ids, distinct = dict.fromkeys(slots, 0), dict.fromkeys(slots, 0)
    seen = {slot: _DistinctIds() for slot in slots}
    for samples in batches:
        last_batch = len(samples.labels)
        num_samples, num_batches = num_samples + last_batch, num_batches + 1
        for slot, bags in samples.bags.items():
            own = np.unique(bags.ids)
            num_ids[slot] += len(bags.ids)
            distinct[slot] += len(own)
            seen[slot].add(own)
    return Workload(
        num_samples=num_samples,
        num_batches=num_batches,
        last_batch=last_batch,
        num_ids=num_ids,
        distinct=distinct,
        rows={slot: each.count() for slot, each in seen.items()},
    )


class _DistinctIds:
    """Counts distinct IDs of many batches. Batches are merged when they are as many as what is known, so that
    each ID is sorted a few times and not once a batch."""

    def __init__(self) -> None:
        self._known = np.empty(0, np.uint64)
        self._new: list[np.ndarray] = []
        self._num_new = 0

    def add(self, ids: np.ndarray) -> None:
        self._new.append(ids)
        self._num_new += len(ids)
        if self._num_new > len(self._known):
            self.count()

    def count(self) -> int:
        self._known = np.unique(np.concatenate([self._known, *self._new]))
        self._new, self._num_new = [], 0
        return len(self._known)


def capacities(config: RecommenderConfig, workload: Workload) -> dict[str, int]:
    """Rows of each table: as configured, or as many as there are distinct IDs."""
    return {slot: settings.capacity or max(1, workload.rows[slot]) for slot, settings in config.slots.items()}


def traffic_of(config: RecommenderConfig, read: dict[str, int], updated: dict[str, int]) -> Traffic:
    """Bytes of rows: a lookup reads each distinct ID's embedding, an update writes embedding and state."""
    slots = config.slots
    return Traffic(
        {
            (TO_NETWORK, "embeddings"): sum(4 * slots[slot].dim * count for slot, count in read.items()),
            (TO_TABLE, "rows"): sum(
                row_bytes(slots[slot].dim, row_optimizer(slots[slot].optimizer)) * count
                for slot, count in updated.items()
            ),
        }
    )


def plan_training(
    config: RecommenderConfig,
    workload: Workload,
    machine: Machine,
    *,
    epochs: int,
    batch_size: int,
    mode: str,
    staleness: int,
    memory_bytes: int | None = None,
    on_disk: bool = False,
) -> Plan:
    """Seconds, bytes and memory of training.

        tables->network  (4 D distinct + 4 D samples) / bandwidth: rows read, pooled vectors written
        network->tables  (2 row distinct + 4 D samples) / bandwidth: rows read and written, gradients read
        processor        6 operations a weight and sample / rate of large matrix products
        sync             all three; hybrid and async: the rows or the processor, if there is a second core

    Both are bounds that are not reached: rows are scattered and a recommender's matrices small.

    Raises:
        DoesNotFit: the tables need more than `memory_bytes`.
        InputError: no samples, or a last batch that cannot be normalised.
    """
    _require_trainable(config, workload, batch_size)
    rows = {slot: min(workload.rows[slot], most) for slot, most in capacities(config, workload).items()}
    busy_s = _epoch_seconds(config, workload, machine)
    memory_s, processor_s = busy_s[TO_NETWORK] + busy_s[TO_TABLE], busy_s[PROCESSOR]
    overlaps = mode != "sync" and staleness > 1 and machine.cores > 1
    seconds = {"sync": memory_s + processor_s, "late": max(memory_s, processor_s)}
    table_bytes = tables_bytes(config, workload, rows, with_rows=not on_disk)
    if memory_bytes is not None and table_bytes > memory_bytes:
        raise DoesNotFit(
            f"The tables need {bytes_text(table_bytes)} of memory; {bytes_text(memory_bytes)} are granted. "
            "Grant more with --memory, keep rows on disk with --disk FOLDER, or give slots a smaller "
            "capacity and `evict: lru` or `lfu`."
        )
    traffic = traffic_of(config, workload.distinct, workload.distinct)
    name = f"{mode}, staleness {staleness}"
    return Plan(
        system="persia",
        title=f"{workload.num_samples:,} samples × {epochs} · {len(config.slots)} slots · batch {batch_size}",
        machine=machine.name,
        phases=(
            Phase(
                name="train",
                seconds=epochs * seconds["late" if overlaps else "sync"],
                busy_s={name: epochs * each_s for name, each_s in busy_s.items()},
                traffic=epochs * traffic,
                counts={
                    "samples": epochs * workload.num_samples,
                    "rows": epochs * sum(workload.distinct.values()),
                },
            ),
        ),
        peak_bytes={"tables": table_bytes},
        budget_bytes={} if memory_bytes is None else {"tables": memory_bytes},
        choices=(
            Choice(name="training", value=name, reason="as asked for"),
            Choice(
                name="rows rest",
                value="on disk" if on_disk else "in memory",
                reason=f"{sum(rows.values()):,} rows",
            ),
        ),
        decision={
            "mode": mode,
            "staleness": staleness,
            "epochs": epochs,
            "batch_size": batch_size,
            "capacity": capacities(config, workload),
        },
        bound=f"the {'memory' if memory_s > processor_s else 'processor'}: an epoch takes at least "
        f"{max(memory_s, processor_s):.3g} s",
        alternatives=(
            Alternative(name="sync", seconds=epochs * seconds["sync"], reason="rows and network one by one"),
            Alternative(
                name="hybrid, staleness 2",
                seconds=epochs * seconds["late" if machine.cores > 1 else "sync"],
                reason="updates of rows behind the network; rows are one batch older",
            ),
        ),
    )


def _require_trainable(config: RecommenderConfig, workload: Workload, batch_size: int) -> None:
    if not workload.num_samples:
        raise InputError("There are no samples to train on.")
    if config.network.batch_norm and workload.last_batch == 1:
        raise InputError(
            f"In batches of {batch_size} the last one has one sample, which batch normalisation cannot do. "
            f"Choose another --batch-size for {workload.num_samples:,} samples."
        )


def _epoch_seconds(config: RecommenderConfig, workload: Workload, machine: Machine) -> dict[str, float]:
    looked_up = updated = 0
    for slot, settings in config.slots.items():
        row = row_bytes(settings.dim, row_optimizer(settings.optimizer))
        pooled = 4 * settings.dim * workload.num_samples
        looked_up += 4 * settings.dim * workload.distinct[slot] + pooled
        updated += 2 * row * workload.distinct[slot] + pooled
    embedded = sum(settings.dim for settings in config.slots.values())
    weights = multiplications(config.network, num_embedded=embedded, num_dense=len(config.dense))
    flops = _FLOPS_PER_MULTIPLICATION * weights * workload.num_samples
    bandwidth = machine.device("host").memory_bandwidth_bytes_per_s
    rate = machine.device("device").matmul_flops_per_s["float32"]
    return {TO_NETWORK: looked_up / bandwidth, TO_TABLE: updated / bandwidth, PROCESSOR: flops / rate}


def tables_bytes(
    config: RecommenderConfig, workload: Workload, rows: dict[str, int], *, with_rows: bool
) -> int:
    """Memory of the tables when they hold `rows`: rows as they are touched, the index whole."""
    total = 0
    for slot, most in capacities(config, workload).items():
        settings = config.slots[slot]
        total += index_bytes(most, evicts=settings.evict is not None, counts=settings.admit_from > 1)
        if with_rows:
            total += rows[slot] * row_bytes(settings.dim, row_optimizer(settings.optimizer))
    return total
