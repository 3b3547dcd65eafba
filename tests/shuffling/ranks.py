"""What ranks of a group run. No pyarrow here: it starts a thread, and ranks are forked."""

import numpy as np

from capstan.shuffling import ShuffledDataset, ShuffledLoader
from capstan.storage import NumpyBlocks

ROWS = 203


def source():
    """203 numbered rows."""
    columns = {"row": np.arange(ROWS), "x": np.arange(2.0 * ROWS).reshape(ROWS, 2)}
    return NumpyBlocks(columns | {"t": np.array([f"r{at}" for at in range(ROWS)])}, rows_per_block=9)


def rows(batches):
    """The numbers of the rows of each batch."""
    return [batch["row"].tolist() for batch in batches]


def read_as_rank(rank, size, arguments):
    """Rank and world size come from torch's default group."""
    return rows(ShuffledLoader(ShuffledDataset(source(), batch_size=16, num_streams=4, buffer=0.2, seed=3)))
