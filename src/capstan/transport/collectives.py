"""Averages over ranks, as operations for a `Communicator`.

Direct: every rank averages one chunk, which all others send it (scatter) and which it sends to all
(gather): two latencies, whatever the number of ranks. Hierarchical: first within a machine, then between.
Ring: PyTorch's.

Source: the centralised primitives of BAGUA, arXiv 2107.01499, section 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from capstan.codecs import Compressor, Identity
from capstan.transport.conversation import Conversation, Operation

_IDENTITY = Identity()


def chunk_bounds(numel: int, num_chunks: int) -> list[tuple[int, int]]:
    """Where each chunk begins and ends: ceil(numel / num_chunks) elements each, less in the last ones."""
    size = -(-numel // num_chunks)
    return [(min(at * size, numel), min((at + 1) * size, numel)) for at in range(num_chunks)]


def average(
    talk: Conversation,
    values: Tensor,
    *,
    compressor: Compressor,
    key: str,
    ranks: Sequence[int] | None = None,
    divisor: int | None = None,
) -> Operation:
    """Replace flat `values` by their mean over `ranks`, encoded on both ways; all end with the same bits.

        y_i = sum_j Q(x_j[chunk i]) / divisor,  values = concat_i Q(y_i)

    Sums go in the order of the ranks, a rank's own part encoded like the others', so the result does not
    depend on who computes it; those of 16-bit values are made in float32. With the identity it is the plain
    mean.

    Args:
        compressor: encodes; with error feedback both on the way in (worker) and on the way out (server).
        key: names the values from step to step.
        ranks: who takes part, in an order that all agree on; default all.
        divisor: what sums are divided by; default the number of `ranks`.
    """
    members = list(range(talk.size)) if ranks is None else list(ranks)
    own, divisor = members.index(talk.rank), divisor or len(members)
    chunks = [values[start:end] for start, end in chunk_bounds(values.numel(), len(members))]
    others = [(own + step) % len(members) for step in range(1, len(members))]  # not all to the first at once

    scatter = talk.round("scatter")
    for at in others:
        payload = scatter.to(members[at], compressor.size(chunks[at]))
        compressor.encode(chunks[at], payload, key=f"{key} worker {at}")
    arriving = {at: scatter.take(members[at], compressor.size(chunks[own])) for at in others}
    kept = compressor.round_trip(chunks[own], key=f"{key} worker {own}")
    gather = talk.round("gather")
    results = {at: gather.take(members[at], compressor.size(chunks[at])) for at in others}
    gather.listen()
    yield scatter

    mean = _sum_in_order(compressor, kept, own, arriving, len(members)).div_(divisor).to(values.dtype)

    result = gather.to([members[at] for at in others], compressor.size(chunks[own]))
    compressor.encode(mean, result, key=f"{key} server")
    compressor.decode(result, chunks[own])
    yield gather
    for at, payload in results.items():
        compressor.decode(payload, chunks[at])


def _sum_in_order(
    compressor: Compressor, kept: Tensor, own: int, arriving: dict[int, Tensor], count: int
) -> Tensor:
    part = torch.empty_like(kept)
    total = torch.zeros_like(kept, dtype=torch.promote_types(kept.dtype, torch.float32))
    for at in range(count):
        if at == own:
            part_of = kept
        else:
            compressor.decode(arriving[at], part)
            part_of = part
        # The first is copied, not added to 0: that keeps the sign of a zero.
        _ = total.copy_(part_of) if at == 0 else total.add_(part_of)
    return total


def average_by_machine(
    talk: Conversation,
    values: Tensor,
    *,
    compressor: Compressor,
    key: str,
    machines: Sequence[Sequence[int]],
) -> Operation:
    """Replace `values` by their mean over all ranks: in full precision within a machine, encoded between.

    The first rank of each machine sums the values of its machine, these sums are averaged between the first
    ranks, and the result is handed back.

    Args:
        machines: the ranks of each machine; every rank in exactly one of them, the same on all ranks.
    """
    mine = next(list(each) for each in machines if talk.rank in each)
    leader, members = mine[0], mine[1:]
    exact = Compressor(_IDENTITY)
    # Both are made before what only the first ranks say to each other, so that numbers agree on all ranks.
    inside, outcome = talk.round("inside"), talk.round("inside")
    if talk.rank != leader:
        exact.encode(values, inside.to(leader, exact.size(values)), key=key)
        yield inside
        result = outcome.take(leader, exact.size(values))
        yield outcome
        exact.decode(result, values)
        return
    parts = [inside.take(rank, exact.size(values)) for rank in members]
    yield inside
    part = torch.empty_like(values)
    for payload in parts:
        exact.decode(payload, part)
        values.add_(part)
    leaders = [each[0] for each in machines]
    if len(leaders) > 1:
        yield from average(talk, values, compressor=compressor, key=key, ranks=leaders, divisor=talk.size)
    else:
        values.div_(talk.size)
    exact.encode(values, outcome.to(members, exact.size(values)), key=key)
    yield outcome


def average_by_ring(talk: Conversation, values: Tensor) -> Operation:
    """Replace `values` by their mean with PyTorch's all-reduce: the same bits as DDP for the same bucket."""
    values.mul_(1 / talk.size)  # as DDP does, which is not always dividing
    yield talk.ring(values)


def broadcast(talk: Conversation, values: Tensor, *, source: int = 0) -> Operation:
    """Replace `values` by those of one rank."""
    exact, copying = Compressor(_IDENTITY), talk.round("broadcast")
    if talk.rank == source:
        targets = [rank for rank in range(talk.size) if rank != source]
        exact.encode(values, copying.to(targets, exact.size(values)), key="broadcast")
        yield copying
        return
    payload = copying.take(source, exact.size(values))
    yield copying
    exact.decode(payload, values)
