"""The bytes that training sends, by formula: what a rank's ledger will hold after so many steps.

Nothing here is measured. The formulas speak of gradients that all ranks have and of ranks with equally many
steps; what crosses beside that (which gradients are missing, the end of an uneven epoch, weights averaged on
request) is the ledger's to tell.

Source: the primitives of BAGUA, arXiv 2107.01499, in docs/data_parallel.md.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from capstan.codecs import Codec, Identity
from capstan.data_parallel.algorithm import Algorithm
from capstan.data_parallel.buckets import Bucket
from capstan.data_parallel.centralised import Centralised
from capstan.data_parallel.decentralised import Decentralised
from capstan.data_parallel.local_sgd import LocalSGD
from capstan.data_parallel.low_precision import LowPrecisionDecentralised
from capstan.data_parallel.peers import neighbours, shift_one
from capstan.data_parallel.powersgd import PowerSGD
from capstan.data_parallel.qadam import QAdamMomenta
from capstan.data_parallel.sharing import messages_of
from capstan.plans import Traffic, rank_link
from capstan.transport.collectives import chunk_bounds
from capstan.transport.message import HEADER_BYTES

_EXACT = Identity()


class Member(NamedTuple):
    """A rank of so many."""

    rank: int
    size: int

    @property
    def others(self) -> list[int]:
        """The other ranks."""
        return [each for each in range(self.size) if each != self.rank]


def sharing_traffic(member: Member, values: Iterable[Tensor]) -> Traffic:
    """The first rank's tensors, to all others."""
    sizes = [sum(each.numel() * each.element_size() for each in alike) for alike in messages_of(values)]
    ends = [(0, target) for target in range(1, member.size) if member.rank in (0, target)]
    return Traffic.total(_message(*end, "broadcast", size) for size in sizes for end in ends)


def pass_traffic(
    algorithm: Algorithm, member: Member, buckets: Sequence[Bucket], *, is_frozen: bool = False
) -> Traffic:
    """The end of one backward pass. `is_frozen`: whether qadam's variance is."""
    if not algorithm.exchanges_gradients:
        return Traffic()
    if is_frozen:
        return _to_all(member, "vote", 1)
    return Traffic.total(_of_gradients(algorithm, member, bucket) for bucket in buckets)


def step_traffic(
    algorithm: Algorithm, member: Member, buckets: Sequence[Bucket], step: int, *, is_frozen: bool = False
) -> Traffic:
    """What crosses around the optimizer's step number `step`, from 0. `async` sends by the clock instead."""
    peers: list[int] | None = None  # all
    codec: Codec = _EXACT
    if isinstance(algorithm, QAdamMomenta) and is_frozen:
        codec = algorithm.codec
    elif isinstance(algorithm, LowPrecisionDecentralised):
        codec, peers = algorithm.codec, sorted(set(neighbours(*member)))
    elif isinstance(algorithm, Decentralised) and step % algorithm.every == 0:
        peer = shift_one(*member, step // algorithm.every)
        if algorithm.peers == "shift_one":
            peers = [] if peer is None else [peer]
    elif isinstance(algorithm, LocalSGD) and (step + 1) % algorithm.every == 0:
        codec = algorithm.codec
    else:
        return Traffic()
    is_wide = isinstance(algorithm, LowPrecisionDecentralised)
    parts = [(each.flat.numel(), _wide(each) if is_wide else each.flat.dtype) for each in buckets]
    if peers is None:
        return Traffic.total(_average(member, codec, *part) for part in parts)
    swaps = ((peer, codec.encoded_bytes((numel,), dtype)) for peer in peers for numel, dtype in parts)
    return Traffic.total(_both_ways(member, peer, "swap", size, size) for peer, size in swaps)


def _of_gradients(algorithm: Algorithm, member: Member, bucket: Bucket) -> Traffic:
    numel, dtype = bucket.flat.numel(), bucket.flat.dtype
    if isinstance(algorithm, PowerSGD):
        counts = algorithm.sent_elements(bucket.shapes)
        return Traffic.total(_average(member, _EXACT, count, _wide(bucket)) for count in counts)
    if isinstance(algorithm, QAdamMomenta) or not isinstance(algorithm, Centralised):
        return _average(member, _EXACT, numel, dtype)
    if algorithm.route == "ring":
        size = 2 * (member.size - 1) * bucket.flat.nbytes // member.size
        ring = Traffic({(rank_link(member.rank, (member.rank + 1) % member.size), "ring"): size})
        return ring + _to_all(member, "used", len(bucket.parameters))
    if algorithm.route == "machines":
        return _by_machine(member, algorithm, numel, dtype)
    return _average(member, algorithm.codec, numel, dtype)


def _by_machine(member: Member, algorithm: Centralised, numel: int, dtype: torch.dtype) -> Traffic:
    machines = algorithm.machines
    leader, *members = next(list(ranks) for ranks in machines if member.rank in ranks)
    inside = _EXACT.encoded_bytes((numel,), dtype)
    peers = members if member.rank == leader else [leader]
    own = Traffic.total(_both_ways(member, peer, "inside", inside, inside) for peer in peers)
    leaders = [ranks[0] for ranks in machines]
    if member.rank != leader or len(leaders) == 1:
        return own
    return own + _average(member, algorithm.codec, numel, dtype, ranks=leaders)


def _average(
    member: Member, codec: Codec, numel: int, dtype: torch.dtype, *, ranks: Sequence[int] | None = None
) -> Traffic:
    """A scatter of chunks and a gather of their means, see `transport.collectives.average`."""
    members = list(range(member.size)) if ranks is None else list(ranks)
    chunks = [codec.encoded_bytes((end - at,), dtype) for at, end in chunk_bounds(numel, len(members))]
    own = chunks[members.index(member.rank)]
    exchanges = [(peer, chunk) for peer, chunk in zip(members, chunks, strict=True) if peer != member.rank]
    return Traffic.total(
        _both_ways(member, peer, "scatter", chunk, own) + _both_ways(member, peer, "gather", own, chunk)
        for peer, chunk in exchanges
    )


def _to_all(member: Member, content: str, size_bytes: int) -> Traffic:
    return Traffic.total(_both_ways(member, peer, content, size_bytes, size_bytes) for peer in member.others)


def _both_ways(member: Member, peer: int, content: str, sent_bytes: int, heard_bytes: int) -> Traffic:
    sent = _message(member.rank, peer, content, sent_bytes)
    return sent + _message(peer, member.rank, content, heard_bytes)


def _message(source: int, target: int, content: str, size_bytes: int) -> Traffic:
    link = rank_link(source, target)
    return Traffic({(link, content): size_bytes, (link, "headers"): HEADER_BYTES})


def _wide(bucket: Bucket) -> torch.dtype:
    return torch.promote_types(bucket.flat.dtype, torch.float32)
