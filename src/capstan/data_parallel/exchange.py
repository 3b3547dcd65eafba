"""A bucket's exchange, and what ranks must know of each other's gradients beside their values.

Two bits in the headers of messages that are sent anyway tell all ranks that some rank lacks a gradient, or
has one that is not finite. Only then more is said.
"""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from capstan.data_parallel.algorithm import Algorithm
from capstan.data_parallel.buckets import Bucket
from capstan.transport import Conversation
from capstan.transport.conversation import Exchange

_INCOMPLETE, _NOT_FINITE = 1, 2


def exchange_bucket(
    talk: Conversation, algorithm: Algorithm, bucket: Bucket
) -> Generator[Exchange, None, None]:
    """Replace a bucket's gradients, and learn which of its parameters have one on any rank."""
    if not all(bucket.present):
        talk.flags |= _INCOMPLETE
    yield from exchange_finite(talk, algorithm, bucket.flat, bucket.shapes, bucket.key)
    bucket.used = list(bucket.present)
    if talk.flags & _INCOMPLETE or not algorithm.all_hear_all:
        yield from _agree_on_used(talk, bucket)


def exchange_finite(
    talk: Conversation, algorithm: Algorithm, values: Tensor, shapes: Sequence[tuple[int, ...]], key: str
) -> Generator[Exchange, None, None]:
    """Replace flat gradients.

    Those that are not finite cannot be encoded in few bits, and residuals must not learn of them. So 0 is
    sent in their place, and all ranks end with NaN: every gradient scaler skips the step.
    """
    if not algorithm.carries_all_values and not values.isfinite().all():
        talk.flags |= _NOT_FINITE
        values.zero_()
    yield from algorithm.exchange(talk, values, shapes, key)
    if talk.flags & _NOT_FINITE:
        values.fill_(torch.nan)


def _agree_on_used(talk: Conversation, bucket: Bucket) -> Generator[Exchange, None, None]:
    """All ranks tell all which parameters have a gradient."""
    telling, others = talk.round("used"), [rank for rank in range(talk.size) if rank != talk.rank]
    count = len(bucket.present)
    telling.to(others, count).copy_(torch.tensor(bucket.present, dtype=torch.uint8))
    arriving = [telling.take(rank, count) for rank in others]
    yield telling
    told = torch.stack([torch.tensor(bucket.present), *(each.bool().cpu() for each in arriving)])
    bucket.used = told.any(0).tolist()
