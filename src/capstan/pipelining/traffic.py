"""How many bytes cross the boundaries: the formula that the ledger must equal."""

from collections.abc import Sequence

import torch

from capstan.codecs import Codec
from capstan.pipelining.compression import Compression
from capstan.plans import Traffic, rank_link

TIED = "tied gradients"


def micro_batches(num_samples: int, wanted: int) -> int:
    """Into how many equal parts a batch is cut: the most, but no more than wanted."""
    return max(parts for parts in range(1, wanted + 1) if num_samples % parts == 0)


def batch_traffic(
    compression: Compression,
    row_shapes: Sequence[tuple[int, ...]],
    *,
    num_new: int,
    num_known: int,
    num_micro_batches: int,
    tied_bytes: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Traffic:
    """What one batch sends over every boundary.

        forward   new samples: 4 s h each      known ones: bytes of Q on (s, h) each
        backward  for each of m micro-batches: bytes of Q on (samples / m, s, h)
        tied      the embedding's gradient in full, between the first and the last stage, each way

    Args:
        compression: in how many bits.
        row_shapes: for each boundary the shape (s, h) of one sample's activations.
        num_new, num_known: samples on their first visit, and others; without changes all are known.
        num_micro_batches: into how many parts it may be cut.
        tied_bytes: of the gradient of an embedding that is tied to the output matrix; 0 for none.

    Source: AC-SGD, arXiv 2206.01299; what Q takes is its codec's own word.
    """
    samples = num_new + num_known
    parts = micro_batches(samples, num_micro_batches)
    found: dict[tuple[str, str], int] = {}
    for index, row in enumerate(row_shapes):
        part = (samples // parts, *row)
        if compression.sends_changes:
            forward = num_new * _size(None, row, dtype) + num_known * _size(compression.forward, row, dtype)
        else:
            forward = parts * _size(compression.forward, part, dtype)
        found[rank_link(index, index + 1), "activations"] = forward
        found[rank_link(index + 1, index), "gradients"] = parts * _size(compression.backward, part, dtype)
    if tied_bytes:
        last = len(row_shapes)
        found |= {(rank_link(*ends), TIED): tied_bytes for ends in ((0, last), (last, 0))}
    return Traffic(found)


def _size(codec: Codec | None, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize if codec is None else codec.encoded_bytes(shape, dtype)
