"""Ranks with unequally many inputs: who has none left takes part in what the others exchange.

Before each exchange inside `Replica.join` all ranks say what comes, or that they have nothing left. Those
lend a hand: 0 in place of gradients, or weights that no step has moved.

Source: the Join context of PyTorch's DDP, which shadows collectives and divides by the number of all ranks.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from capstan.errors import UsageError
from capstan.transport import Group

Moment = Literal["buffers", "gradients", "step"]


class Exchange(NamedTuple):
    """What the ranks that go on exchange next.

    `source` is the last of them, as under DDP, `factor` by how much their loss's scale has changed.
    """

    moment: Moment
    source: int
    factor: float


class UnevenInputs:
    """What ranks tell each other inside one `join`.

    Args:
        take_part: this rank's side of an exchange for which it has nothing.
    """

    def __init__(self, group: Group, take_part: Callable[[Exchange], None]) -> None:
        self._group, self._take_part = group, take_part
        self._going_on: list[int] = []  # when somebody last did

    def announce(self, moment: Moment, factor: float = 1.0) -> Exchange:
        """This rank goes on: before each exchange; those that have nothing left hear of it."""
        exchange = self._agree({"moment": moment, "factor": factor})
        assert exchange is not None, "this rank goes on"
        return exchange

    def see_out(self) -> int | None:
        """This rank has nothing left: take part until no rank goes on.

        Returns the last rank of those that went on longest, whose state is to be all ranks'; None where no
        rank did anything.
        """
        while (exchange := self._agree(None)) is not None:
            self._take_part(exchange)
        return self._going_on[-1] if self._going_on else None

    @property
    def was_even(self) -> bool:
        """Whether all ranks went on equally long."""
        return len(self._going_on) == self._group.size

    def _agree(self, own: dict[str, str | float] | None) -> Exchange | None:
        said = {rank: each for rank, each in enumerate(self._group.gather(own)) if each is not None}
        if not said:
            return None
        first, source = min(said), max(said)
        for rank, each in said.items():
            if each["moment"] != said[first]["moment"]:
                raise UsageError(
                    f"Inside join() ranks do the same things, only not equally often; rank {first} is at "
                    f"its {said[first]['moment']}, rank {rank} at its {each['moment']}."
                )
        self._going_on = sorted(said)
        return Exchange(said[source]["moment"], source, said[source]["factor"])
