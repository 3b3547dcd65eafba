"""Which requests begin alike: groups whose common beginning is computed once.

Prompts in order of their tokens lie beside those they share most with. A group is cut where sharing would
fall below a share of the prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

# Below these a prefix is not worth a pass of its own.
_LEAST_TOKENS, _LEAST_SHARE = 16, 0.25


class Group(NamedTuple):
    """Indices of prompts that share their first `prefix` tokens."""

    indices: tuple[int, ...]
    prefix: int


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike."""
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)


def groups_of(prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[Group]:
    """Every prompt in one group; prompt i shares at most its first `limits[i]` tokens."""
    order = sorted(range(len(prompts)), key=lambda at: list(prompts[at]))
    groups: list[Group] = []
    current: list[int] = []
    shared = 0
    for index in order:
        if current:
            length = min(shared, limits[index], common_length(prompts[current[0]], prompts[index]))
            if length >= max(_LEAST_TOKENS, _LEAST_SHARE * len(prompts[index])):
                current.append(index)
                shared = length
                continue
            groups.append(_closed(current, shared))
        current, shared = [index], limits[index]
    if current:
        groups.append(_closed(current, shared))
    return groups


def _closed(indices: list[int], shared: int) -> Group:
    return Group(tuple(indices), shared if len(indices) > 1 and shared >= _LEAST_TOKENS else 0)
