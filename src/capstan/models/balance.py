"""Consecutive layers in parts that cost about the same."""

from collections.abc import Sequence


def balanced_ends(costs: Sequence[float], num_parts: int) -> list[int]:
    """The ends of consecutive, non-empty parts whose largest sum is smallest; by dynamic programming."""
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[end]: the largest sum of the first `end` layers in so many parts, and the parts' ends.
    best: dict[int, tuple[float, list[int]]] = {end: (sums[end], [end]) for end in range(1, len(costs) + 1)}
    for parts in range(2, num_parts + 1):
        best = {
            end: min(
                (max(best[start][0], sums[end] - sums[start]), [*best[start][1], end])
                for start in range(parts - 1, end)
            )
            for end in range(parts, len(costs) + 1)
        }
    return best[len(costs)][1]
