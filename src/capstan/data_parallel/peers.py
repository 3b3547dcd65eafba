"""Who averages with whom in which round."""


def shift_one(rank: int, size: int, round_number: int) -> int | None:
    """The peer of a rank in a round; None for the one that sits out where their number is odd.

    Of an even number of ranks one half meets the other, in size / 2 rounds everyone there (BAGUA's rule).
    Of an odd number r meets t - r modulo size: each meets all others in size rounds, and one is alone in
    each.

    Source: BAGUA, decentralized_full_precision_synchronous.rs, which refuses odd numbers.
    """
    if size % 2:
        peer = (round_number - rank) % size
        return None if peer == rank else peer
    half = size // 2
    if rank < half:
        return (round_number + rank) % half + half
    return (rank - half - round_number) % half


def neighbours(rank: int, size: int) -> tuple[int, int]:
    """Left and right on a ring; of two ranks the same one."""
    return (rank - 1) % size, (rank + 1) % size
