"""Which tests of a grid of parameters run by default: so few that any `strength` of the parameters meet.

Most faults need one or two parameters to show (Kuhn, Wallace and Gallo, IEEE TSE 30(6), 2004), and a grid of
three is many times as large as a choice in which any two meet. The others still run: they are slow.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import combinations


def covering(tests: Sequence[Mapping[str, Hashable]], strength: int) -> set[int]:
    """The positions of tests that together meet every combination of `strength` parameters that any test has.

    A test is a value of each parameter. Greedy: always the test that meets most of what was not met, of
    equals the first; so of a full grid of 3 parameters nearly as few as there can be.
    """
    meets = [set(_combinations(test, strength)) for test in tests]
    left: set[tuple[tuple[str, Hashable], ...]] = set().union(*meets)
    chosen: set[int] = set()
    while left:
        best = max(range(len(tests)), key=lambda at: (len(meets[at] & left), -at))
        chosen.add(best)
        left -= meets[best]
    return chosen


def _combinations(test: Mapping[str, Hashable], strength: int) -> Iterator[tuple[tuple[str, Hashable], ...]]:
    return combinations(sorted(test.items()), min(strength, len(test)))
