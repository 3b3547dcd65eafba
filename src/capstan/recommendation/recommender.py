"""A recommender: embedding tables, dense network and their optimizers, trained, scored and kept as one."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from capstan.errors import InputError
from capstan.recommendation.admission import Frequency, LeastFrequent, LeastRecent
from capstan.recommendation.click_log import ClickLog, Samples
from capstan.recommendation.hybrid_embedding import HybridEmbedding
from capstan.recommendation.ranking_network import RankingNetwork, dense_optimizer
from capstan.recommendation.table import EmbeddingTable
from capstan.recommendation.training_config import RecommenderConfig, row_optimizer
from capstan.storage import open_atomically

_FORMAT = "capstan.recommender"
_VERSION = 1
_EVICTIONS = {None: None, "lru": LeastRecent(), "lfu": LeastFrequent()}


@dataclass
class Clock:
    """Seconds of wall time in epochs, and of those in the dense network."""

    epochs_s: float = 0.0
    network_s: float = 0.0


@dataclass
class Recommender:
    """The parts of a recommender, and how many epochs it was trained."""

    config: RecommenderConfig
    embedding: HybridEmbedding
    network: RankingNetwork
    optimizer: torch.optim.Optimizer
    epochs_done: int = 0
    clock: Clock = field(default_factory=Clock)

    @classmethod
    def build(
        cls,
        config: RecommenderConfig,
        capacity: dict[str, int],
        *,
        mode: str = "sync",
        staleness: int = 1,
        seed: int = 0,
        folder: Path | None = None,
        threads: int | None = None,
    ) -> Self:
        """An untrained recommender, a function of configuration and seed."""
        tables = {
            slot: EmbeddingTable(
                settings.dim,
                capacity=capacity[slot],
                optimizer=row_optimizer(settings.optimizer),
                name=slot,
                seed=seed,
                initial=settings.initial,
                admission=Frequency(settings.admit_from),
                eviction=_EVICTIONS[settings.evict],
                folder=folder,
                threads=threads or torch.get_num_threads(),
            )
            for slot, settings in config.slots.items()
        }
        pooling = {slot: settings.pooling for slot, settings in config.slots.items()}
        embedded = sum(settings.dim for settings in config.slots.values())
        network = RankingNetwork(
            config.network, num_embedded=embedded, num_dense=len(config.dense), seed=seed
        )
        return cls(
            config=config,
            embedding=HybridEmbedding(tables, pooling=pooling, mode=mode, staleness=staleness),
            network=network,
            optimizer=dense_optimizer(network, config.optimizer),
        )

    def train_epoch(self, log: ClickLog, batch_size: int) -> float:
        """Train on every sample of a file once, in its order; returns the mean loss of the samples."""
        self.embedding.train()
        self.network.train()
        started_s = time.perf_counter()
        total = 0.0
        batches = log.batches(batch_size)
        samples = next(batches, None)
        while samples is not None:
            following = next(batches, None)
            total += self._train_batch(samples, following) * len(samples.labels)
            samples = following
        self.embedding.flush()
        self.clock.epochs_s += time.perf_counter() - started_s
        self.epochs_done += 1
        return total / max(1, log.num_samples)

    def _train_batch(self, samples: Samples, following: Samples | None) -> float:
        pooled = self.embedding(samples.bags)
        if following is not None and self.embedding.staleness > 1:
            self.embedding.prefetch(following.bags)
        started_s = time.perf_counter()
        logits = self._logits(pooled, samples)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(samples.labels))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.clock.network_s += time.perf_counter() - started_s
        self.embedding.step()
        return loss.item()

    def _logits(self, pooled: dict[str, Tensor], samples: Samples) -> Tensor:
        return self.network(  # type: ignore[no-any-return]
            torch.cat(list(pooled.values()), 1), torch.from_numpy(samples.dense)
        )

    def scores(self, log: ClickLog, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Labels and logits of every sample of a file. Nothing is inserted; unknown IDs are zeros."""
        self.embedding.eval()
        self.network.eval()
        labels, logits = [np.empty(0, np.float32)], [np.empty(0, np.float32)]
        with torch.no_grad():
            for samples in log.batches(batch_size):
                labels.append(samples.labels)
                logits.append(self._logits(self.embedding(samples.bags), samples).numpy())
        return np.concatenate(labels), np.concatenate(logits)

    def save(self, path: Path, how: dict[str, Any]) -> None:
        """Write rows, network and optimizers into one file, whole or not at all; `how` it was trained too."""
        state = {
            "format": _FORMAT,
            "version": _VERSION,
            "how": how | {"config": self.config.model_dump(mode="json")},
            "epochs_done": self.epochs_done,
            "embedding": self.embedding.get_extra_state(),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with open_atomically(path) as file:
            torch.save(state, file)

    def load(self, path: Path, how: dict[str, Any]) -> None:
        """Go on from a saved recommender that was trained in the same way.

        Raises:
            InputError: it is not one, or it was trained otherwise.
        """
        state = read_recommender(path)
        wanted = how | {"config": self.config.model_dump(mode="json")}
        differing = [name for name in wanted if state["how"].get(name) != wanted[name]]
        if differing:
            raise InputError(
                f"{path} was trained with another {' and '.join(differing)}. Give what it was trained with, "
                "or another --output."
            )
        self.embedding.set_extra_state(state["embedding"])
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epochs_done = state["epochs_done"]


def read_recommender(path: Path) -> dict[str, Any]:
    """What `Recommender.save` wrote.

    Raises:
        InputError: the file is not there, or is not that.
    """
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise InputError(f"{path} is not there, or is not a trained recommender.") from error
    if not isinstance(state, dict) or (state.get("format"), state.get("version")) != (_FORMAT, _VERSION):
        raise InputError(f"{path} is not a trained recommender of version {_VERSION}.")
    return state


def export_tables(path: Path, folder: Path) -> dict[str, int]:
    """Write each slot's rows as `<slot>.parquet`, columns `id` and `embedding`; returns how many."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    written = {}
    for slot, table in read_recommender(path)["embedding"].items():
        ids, dim = table["ids"].numpy().view(np.uint64), int(table["dim"])
        rows = np.ascontiguousarray(table["rows"].numpy()[:, :dim]).reshape(-1)
        columns = {"id": pa.array(ids), "embedding": pa.FixedSizeListArray.from_arrays(pa.array(rows), dim)}
        with open_atomically(folder / f"{slot}.parquet") as file:
            pq.write_table(pa.table(columns), file)
        written[slot] = len(ids)
    return written
