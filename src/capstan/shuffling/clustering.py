"""How clustered a table is, and what a buffer makes of it.

With g(row) the gradient of a row's loss at the beginning of training, σ² its variance over all rows and b the
rows of a block,

    h_D = (mean over blocks of |mean g of the block - mean g|²) · b / σ²

is 1 where blocks look like random samples and b where all rows of a block are alike. A buffer of n of N
blocks has a mean gradient as noisy as that of

    effective rows = n b / ((1 - α) h_D),   α = (n - 1) / (N - 1)

rows drawn at random; with all blocks it is a full shuffle, and effective rows are all rows.

Source: h_D and α are CorgiPile's; effective rows solve its variance for the size of a random sample.
Differs: h_D is estimated from a few blocks, at weights 0, and never below 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from capstan.errors import InputError, UsageError
from capstan.shuffling.examples import Floats, survey
from capstan.shuffling.linear_models import LinearModel
from capstan.shuffling.reading import row_count
from capstan.storage import BlockSource

GOOD, POOR = 50.0, 10.0
"""Effective rows a buffer: from `GOOD` on training goes as with a full shuffle, below `POOR` it suffers.
Found with label-sorted data and linear models; deep networks were not tried."""


def block_variance_factor(gradients: Sequence[Floats]) -> float:
    """h_D from the rows' gradients, one (rows, weights) array a block, of all blocks or of some.

    The mean over a sample of blocks stands in for that of all, which makes distances to it smaller by
    (blocks - 1) / blocks; that is undone.
    """
    blocks = [each for each in gradients if len(each)]
    if len(blocks) < 2:
        return 1.0
    every = np.concatenate(blocks)
    variance = float(every.var(axis=0).sum())
    if variance == 0:
        return 1.0
    means = np.stack([each.mean(axis=0) for each in blocks])
    between = float(means.var(axis=0, ddof=1).sum())
    return between * (len(every) / len(blocks)) / variance


def effective_rows(*, buffer_blocks: int, rows_per_block: float, num_blocks: int, h_d: float) -> float:
    """See the head of this file; all rows where the buffer holds all blocks.

    Raises:
        UsageError: no block, or more in the buffer than there are.
    """
    if not 1 <= buffer_blocks <= num_blocks:
        raise UsageError(f"A buffer has 1 to {num_blocks} blocks, not {buffer_blocks}.")
    every = num_blocks * rows_per_block
    if buffer_blocks == num_blocks:
        return every
    rest = (num_blocks - buffer_blocks) / (num_blocks - 1)
    return min(every, buffer_blocks * rows_per_block / (rest * max(h_d, 1e-12)))


def advised_buffer(*, rows_per_block: float, num_blocks: int, h_d: float) -> int:
    """The fewest blocks whose buffer has `GOOD` effective rows; all blocks where no fewer do."""
    low, high = 1, num_blocks
    while low < high:  # effective rows grow with the buffer
        middle = (low + high) // 2
        found = effective_rows(
            buffer_blocks=middle, rows_per_block=rows_per_block, num_blocks=num_blocks, h_d=h_d
        )
        low, high = (low, middle) if found >= GOOD else (middle + 1, high)
    return low


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """What a look at some blocks found."""

    label: str
    model: str
    num_rows: int
    num_blocks: int
    blocks_read: int
    rows_per_block: float
    h_d: float

    def effective_rows(self, buffer_blocks: int) -> float:
        """What a buffer of so many blocks is worth."""
        return effective_rows(
            buffer_blocks=buffer_blocks,
            rows_per_block=self.rows_per_block,
            num_blocks=self.num_blocks,
            h_d=self.h_d,
        )

    @property
    def advised_buffer(self) -> int:
        """The fewest blocks that are enough."""
        return advised_buffer(rows_per_block=self.rows_per_block, num_blocks=self.num_blocks, h_d=self.h_d)

    @property
    def verdict(self) -> str:
        """How clustered that is, in words."""
        if self.num_blocks == 1:
            return "one block: a buffer is the whole table, which is a full shuffle"
        if self.h_d < 2:
            return "not clustered: blocks look like random samples"
        share = self.h_d / self.rows_per_block
        return "fully clustered: rows of a block are alike" if share > 0.25 else "clustered"


def look_at(
    sample: BlockSource, *, label: str, num_rows: int, num_blocks: int, features: Sequence[str] | None = None
) -> Clustering:
    """Judge a table by some of its blocks, which `sample` has; the table's own numbers are given.

    A label with 2 to 100 values is taken for classes (softmax), any other number for a quantity (linear).

    Raises:
        InputError, UsageError: the label is missing, or there is nothing to learn from.
    """
    classes = set()
    for block in range(sample.num_blocks):
        rows = sample.read(block)
        if label in rows:
            classes |= set(np.unique(rows[label]).tolist())
    is_text = any(isinstance(value, str) for value in classes)
    is_regression = len(classes) > 100 and not is_text
    examples = survey(sample, label=label, is_regression=is_regression, features=features)
    model = "linear" if is_regression else "softmax"
    if not is_regression and len(classes) < 2:
        raise InputError(
            f"The label {label!r} has one value in all {sample.num_blocks} blocks that were read. Is it the "
            "right column? Else read more blocks."
        )
    head = LinearModel.begin(model, examples.num_features, len(examples.classes))
    gradients = []
    for block in range(sample.num_blocks):
        rows = sample.read(block)
        gradients.append(head.gradients(examples.x(rows), examples.y(rows)))
    read = sum(row_count(sample.read(block)) for block in range(sample.num_blocks))
    return Clustering(
        label=label,
        model=model,
        num_rows=num_rows,
        num_blocks=num_blocks,
        blocks_read=sample.num_blocks,
        rows_per_block=num_rows / num_blocks if num_blocks else read,
        h_d=block_variance_factor(gradients),
    )
