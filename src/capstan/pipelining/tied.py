"""The gradient of an embedding that is tied to the output matrix, which first and last stage both hold."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from capstan.pipelining.traffic import TIED
from capstan.plans import rank_link
from capstan.transport import Group, Ledger
from capstan.transport.group import Parcel

_NUMBER = 0  # of the exchange; nothing else is exchanged while it is under way
_ABOUT = "the gradient of the tied embedding"


@contextmanager
def gradients_summed(weight: nn.Parameter | None, group: Group, ledger: Ledger) -> Iterator[None]:
    """The gradient that `weight` is given inside is, afterwards, the sum over both its copies, equal bit for
    bit. Ranks without a copy give None."""
    if weight is None:
        yield
        return
    yield
    own = torch.zeros_like(weight) if weight.grad is None else weight.grad
    other, peer = torch.empty_like(own), 0 if group.is_last else group.size - 1
    for transfer in group.exchange([Parcel(peer, own)], [Parcel(peer, other)], number=_NUMBER, about=_ABOUT):
        transfer.wait()
    ledger.count(rank_link(group.rank, peer), TIED, own.nbytes)
    weight.grad = own + other
