"""What a partition costs in EinDecomp's model: elements touched, not bytes sent.

A join partition p gives every label ℓ of an operation p_ℓ parts, so that there are Π p_ℓ joins, one a
device. With d_ℓ the size of ℓ:

    join          Σ over inputs of  Π_(ℓ in input) d_ℓ · Π_(ℓ not in input) p_ℓ
    aggregation   Π_(ℓ in output) d_ℓ · (Π_(ℓ not in output) p_ℓ − 1)
    repartition   0 where a = b, else  size · Π max(a, b) / a  +  size · (Π max(a, b) / b − 1)

Source: EinDecomp, arXiv 2410.02682. It ranks plans: an input that is already in place still costs its size.
What is really sent is counted in `site_traffic`.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from math import prod

from capstan.errors import UsageError

Parts = tuple[int, ...]


def join_cost(sizes: Mapping[str, int], inputs: Sequence[str], parts: Mapping[str, int]) -> int:
    """Elements that the joins read: each input once per combination of the labels that it lacks."""
    return sum(
        prod(sizes[label] for label in labels)
        * prod(count for label, count in parts.items() if label not in labels)
        for labels in inputs
    )


def aggregation_cost(sizes: Mapping[str, int], output: str, parts: Mapping[str, int]) -> int:
    """Elements of partial results that are added to another one."""
    partials = prod(count for label, count in parts.items() if label not in output)
    return prod(sizes[label] for label in output) * (partials - 1)


def repartition_cost(size: int, before: Parts, after: Parts) -> int:
    """Elements touched to turn one partition of a tensor of `size` elements into another."""
    if before == after:
        return 0
    finest = prod(max(a, b) for a, b in zip(before, after, strict=True))
    return finest // prod(before) * size + (finest // prod(after) - 1) * size


@cache
def partitions(sizes: Parts, num_parts: int) -> tuple[Parts, ...]:
    """Powers of two per dimension, none above its size, whose product is `num_parts`.

    Where the dimensions are too small for that, the partitions with the most parts that there are.
    """
    totals: list[tuple[Parts, int]] = [((), 1)]
    for size in sizes:
        powers = [2**power for power in range(num_parts.bit_length()) if 2**power <= size]
        totals = [
            ((*parts, power), total * power)
            for parts, total in totals
            for power in powers
            if total * power <= num_parts
        ]
    most = max(total for _, total in totals)
    return tuple(parts for parts, total in totals if total == most)


def check_num_devices(num_devices: int) -> None:
    """Refuse a number of devices that partitions in powers of two cannot fill.

    Raises:
        UsageError: it is no power of two.
    """
    if num_devices < 1 or num_devices & (num_devices - 1):
        raise UsageError(
            f"{num_devices} devices: partitions are in powers of two, so their number must be one; use "
            f"{2 ** max(num_devices.bit_length() - 1, 0)}."
        )
