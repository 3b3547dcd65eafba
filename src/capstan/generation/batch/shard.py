"""A shard: one machine's share of a batch file, that of every n-th line."""

import re
from dataclasses import dataclass
from typing import Self

from capstan.errors import UsageError


@dataclass(frozen=True)
class Shard:
    """Share `index` of `count`, counted from 1. Every line, good or bad, lies in exactly one.

    Lines are dealt like cards, and empty ones not at all, so that a file sorted by length gives shares of
    like work.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `2/8`.

        Raises:
            UsageError: it is written otherwise, or there is no such share.
        """
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        shard = cls(*map(int, found.groups())) if found else None
        if shard is None or not 1 <= shard.index <= shard.count:
            raise UsageError(
                f"--shard takes I/N, the I-th of N shares with I from 1 to N, as in 2/8; not {text!r}."
            )
        return shard

    def holds(self, position: int) -> bool:
        """Whether this share has the line at `position`, counted from 1 over the lines that are not empty."""
        return (position - self.index) % self.count == 0

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Shard(1, 1)
