"""Blocks in a training order as a PyTorch dataset and loader, which can be stopped and taken up anywhere.

    dataset = ShuffledDataset(open_source("train.parquet"), batch_size=256, seed=7)
    loader = ShuffledLoader(dataset, num_workers=2)
    for epoch in range(loader.epoch, 5):
        for batch in loader:                     # a dict of tensors: this rank's part of the step
            ...
            torch.save({"loader": loader.state_dict()}, …)

`batch_size` is that of a step over all ranks. A step's rows are the same for every number of ranks and of
workers: a worker prepares its part of each batch, from its own streams, and the loader puts the parts
together. So no block is read by two workers, except where a cut between streams goes through it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from capstan.errors import InputError, UsageError
from capstan.shuffling.order import Order
from capstan.shuffling.reading import Batches, Share, row_count
from capstan.storage import BlockSource, Rows

Batch = dict[str, Any]
_FORMAT = "capstan.shuffle.order.1"
_DEFAULT_STREAMS = 8


class ShuffledDataset(IterableDataset[Batch]):
    """The batches of one epoch: for each column a tensor, and for texts a NumPy array.

    `buffer` is the share of the blocks that is shuffled together. `num_streams`, which ranks × workers must
    divide, is by default 8, or the largest power of two that a smaller buffer has blocks for. Rank and world
    size are torch's default group's, or given.

    Use it with `ShuffledLoader`; a plain `DataLoader(dataset, batch_size=None)` without workers does too.

    Raises:
        UsageError: ranks that do not divide the streams or the batch, or a number out of range.
    """

    def __init__(
        self,
        source: BlockSource,
        *,
        batch_size: int,
        strategy: str = "corgipile",
        buffer: float = 0.1,
        seed: int = 0,
        num_streams: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if not 0 < buffer <= 1:
            raise UsageError(f"A buffer is a share of the blocks above 0 and up to 1, not {buffer}.")
        if (rank is None) != (world_size is None):
            raise UsageError("Give both rank and world_size, or neither.")
        if rank is None or world_size is None:
            in_group = dist.is_available() and dist.is_initialized()
            rank, world_size = (dist.get_rank(), dist.get_world_size()) if in_group else (0, 1)
        blocks = max(1, round(buffer * source.num_blocks))
        order = Order(
            sizes=tuple(source.num_rows(block) for block in range(source.num_blocks)),
            seed=seed,
            strategy=strategy,
            buffer_blocks=blocks,
            num_streams=num_streams or 2 ** (min(_DEFAULT_STREAMS, blocks).bit_length() - 1),
        )
        self.source = source
        self.share = Share(order=order, batch_size=batch_size, rank=rank, world_size=world_size)
        self.start_step = 0

    def __len__(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return self.share.num_steps

    def at(self, epoch: int, step: int) -> "ShuffledDataset":
        """The same from a step of an epoch on."""
        other: ShuffledDataset = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.share = replace(self.share, order=self.share.order.at_epoch(epoch))
        other.start_step = step
        return other

    def __iter__(self) -> Iterator[Batch]:
        if get_worker_info() is not None:
            raise UsageError("With workers a ShuffledDataset is read by ShuffledLoader, not by DataLoader.")
        return _batches(self.source, self.share, self.start_step)


def _batches(source: BlockSource, share: Share, start_step: int) -> Iterator[Batch]:
    with Batches(source, share, start_step=start_step) as batches:
        for rows in batches:
            yield _tensors(rows)


def _tensors(rows: Rows) -> Batch:
    """Copies, so that a batch that is kept does not keep the buffer that it came from."""
    return {
        name: torch.from_numpy(np.array(column)) if column.dtype.kind in "biufc" else np.array(column)
        for name, column in rows.items()
    }


@dataclass
class _WorkersParts(IterableDataset[Batch]):
    """In worker k of K: the part of each batch that lies in its streams."""

    dataset: ShuffledDataset
    num_workers: int

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        assert worker is not None, "this runs in workers only"
        share = _part_of(self.dataset.share, worker.id, self.num_workers)
        return _batches(self.dataset.source, share, self.dataset.start_step)


def _part_of(share: Share, worker: int, num_workers: int) -> Share:
    return replace(
        share,
        rank=share.rank + share.world_size * worker,
        world_size=share.world_size * num_workers,
    )


class ShuffledLoader:
    """Epoch after epoch of a `ShuffledDataset`, prepared by worker processes if there are any.

    Iterating gives the rest of the present epoch: all of it at first, what is left after a break or after
    `load_state_dict`. At its end the next epoch is the present one. `options` go to torch's DataLoader
    (`pin_memory`, `prefetch_factor`, `multiprocessing_context`, …).

    Raises:
        UsageError: ranks × workers do not divide the streams or the batch.
    """

    def __init__(self, dataset: ShuffledDataset, *, num_workers: int = 0, **options: Any) -> None:
        self.dataset, self.num_workers, self._options = dataset, num_workers, options
        self.epoch = self.step = 0
        if num_workers:
            _part_of(dataset.share, 0, num_workers)  # refuses what cannot be divided, before workers start

    def __len__(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return len(self.dataset)

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.dataset.at(self.epoch, self.step)
        steps = range(self.step, len(self))
        batches = self._merged(epoch, steps) if self.num_workers else self._alone(epoch)
        for step, batch in zip(steps, batches, strict=True):
            self.step = step + 1
            yield batch
        self.epoch, self.step = self.epoch + 1, 0

    def _alone(self, epoch: ShuffledDataset) -> Iterator[Batch]:
        return iter(DataLoader(epoch, batch_size=None, **self._options))

    def _merged(self, epoch: ShuffledDataset, steps: range) -> Iterator[Batch]:
        parts = iter(
            DataLoader(
                _WorkersParts(epoch, self.num_workers),
                batch_size=None,
                num_workers=self.num_workers,
                **self._options,
            )
        )
        share = epoch.share
        for step in steps:
            # torch asks workers in turns, so these are the parts of one step.
            of_step = [next(parts) for _ in range(self.num_workers)]
            start = step * share.batch_size
            first = (start + (share.rank - start) % share.world_size) // share.world_size
            yield _interleaved(of_step, first % self.num_workers)
        assert next(parts, None) is None, "workers have as many steps as the epoch"

    def state_dict(self) -> dict[str, Any]:
        """Where this loader stands: some numbers, no rows. The same on every rank."""
        epoch, step = (self.epoch + 1, 0) if self.step == len(self) else (self.epoch, self.step)
        return self._identity() | {"epoch": epoch, "step": step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where another loader stood, of any number of ranks and workers that divides the streams.

        Raises:
            InputError: it read other data, or in another order.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise InputError(
                    f"This state is of another order: its {name} is {state.get(name)!r}, here {mine!r}. "
                    "Make the dataset as it was, from the same file."
                )
        self.epoch, self.step = state["epoch"], state["step"]

    def _identity(self) -> dict[str, Any]:
        order = self.dataset.share.order
        return {
            "format": _FORMAT,
            "fingerprint": self.dataset.source.fingerprint,
            "seed": order.seed,
            "strategy": order.strategy,
            "buffer_blocks": order.buffer_blocks,
            "num_streams": order.num_streams,
            "batch_size": self.dataset.share.batch_size,
        }


def _interleaved(parts: list[Batch], first: int) -> Batch:
    """Rows of the parts in turns, beginning with part `first`; a last batch may leave a part without rows."""
    total = sum(map(row_count, parts))
    pattern = next(part for part in parts if row_count(part))
    merged: Batch = {}
    for name, example in pattern.items():
        if isinstance(example, np.ndarray):
            kind = np.result_type(*(part[name].dtype for part in parts if part))
            merged[name] = np.empty((total, *example.shape[1:]), kind)
        else:
            merged[name] = example.new_empty((total, *example.shape[1:]))
        for worker, part in enumerate(parts):
            if row_count(part):
                merged[name][(worker - first) % len(parts) :: len(parts)] = part[name]
    return merged
