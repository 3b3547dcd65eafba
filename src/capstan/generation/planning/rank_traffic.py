"""What passes between ranks in a turn: hidden states to the next rank, outcomes from the last to all."""

from collections.abc import Sequence

from capstan.generation.planning.batching import BatchWork
from capstan.generation.planning.stage import Stage
from capstan.plans import Traffic, rank_link

OUTCOME_BYTES = 8


def rank_traffic(
    stage: Stage, works: Sequence[BatchWork], *, hidden_bytes: int, keeps_cache: bool
) -> Traffic:
    """Bytes that this rank sends and receives in a turn.

    An outcome is a new token, or the log-probability of a token whose text is scored. Log-probabilities that
    requests ask for beside new tokens are counted when they pass, but lengths do not tell of them.
    """
    rank, last = stage.group.rank, stage.last_rank
    all_works = [work for batch in works for chunk in batch.chunks for work in chunk.works]
    hidden = sum(work.count for work in all_works) * hidden_bytes
    outcomes = sum(1 if keeps_cache else work.count - 1 for work in all_works if not work.is_prefix)
    hops = [(before, before + 1) for before in range(last) if rank in (before, before + 1)]
    listeners = range(last) if rank == last else (rank,)
    return Traffic(
        {(rank_link(*hop), "activations"): hidden for hop in hops}
        | {(rank_link(last, each), "outcomes"): OUTCOME_BYTES * outcomes for each in listeners}
    )


def rank_links_s(stage: Stage, traffic: Traffic) -> dict[str, float]:
    """Seconds for which the links between ranks are busy."""
    return {link: stage.seconds(link, traffic.on(link)) for link in traffic.links}
