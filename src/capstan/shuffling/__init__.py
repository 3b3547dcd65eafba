"""shuffling: a training order as good as a full shuffle, at sequential speed (CorgiPile).

    source = open_source("train.parquet")
    order = Order(sizes=source.sizes, seed=7, buffer_blocks=50)
    with Batches(source, Share(order=order, batch_size=128)) as batches:
        for rows in batches:
            ...

Importing it imports neither torch nor pyarrow.
"""

from capstan.shuffling.order import STRATEGIES, Order, Piece, Refill, num_steps
from capstan.shuffling.reading import Account, Batches, Share
from capstan.shuffling.sources import FileBlocks, SizedBlocks, open_source

__all__ = [
    "STRATEGIES",
    "Account",
    "Batches",
    "FileBlocks",
    "Order",
    "Piece",
    "Refill",
    "Share",
    "SizedBlocks",
    "num_steps",
    "open_source",
]
