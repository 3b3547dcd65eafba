"""shuffling: a training order as good as a full shuffle, at sequential speed (CorgiPile).

    source = open_source("train.parquet")
    order = Order(sizes=source.sizes, seed=7, buffer_blocks=50)
    with Batches(source, Share(order=order, batch_size=128)) as batches:
        for rows in batches:
            ...

Importing it imports neither torch nor pyarrow; the PyTorch dataset and loader bring torch when first named.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from capstan.shuffling.clustering import (
    Clustering,
    advised_buffer,
    block_variance_factor,
    effective_rows,
    look_at,
)
from capstan.shuffling.examples import Examples, choose_columns, survey
from capstan.shuffling.linear_models import LinearModel
from capstan.shuffling.order import STRATEGIES, Order, Piece, Refill, num_steps
from capstan.shuffling.planner import Rates, Sample, measure_rates, plan_epoch, plan_training
from capstan.shuffling.reading import Account, Batches, Share
from capstan.shuffling.sources import FileBlocks, SizedBlocks, open_source
from capstan.shuffling.training import Trained, Training, train

if TYPE_CHECKING:
    from capstan.shuffling.torch_dataset import ShuffledDataset, ShuffledLoader

__all__ = [
    "STRATEGIES",
    "Account",
    "Batches",
    "Clustering",
    "Examples",
    "FileBlocks",
    "LinearModel",
    "Order",
    "Piece",
    "Rates",
    "Refill",
    "Sample",
    "Share",
    "ShuffledDataset",
    "ShuffledLoader",
    "SizedBlocks",
    "Trained",
    "Training",
    "advised_buffer",
    "block_variance_factor",
    "choose_columns",
    "effective_rows",
    "look_at",
    "measure_rates",
    "num_steps",
    "open_source",
    "plan_epoch",
    "plan_training",
    "survey",
    "train",
]

_WITH_TORCH = ("ShuffledDataset", "ShuffledLoader")


def __getattr__(name: str) -> object:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("capstan.shuffling.torch_dataset"), name)
