"""What passes between this rank and the others while a job runs.

Hidden states come from the rank before and go to the next one, through a buffer of their own, so that this
rank can begin its next turn while they are on their way. The last rank tells all others what came out.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from capstan.generation.planning.rank_traffic import OUTCOME_BYTES
from capstan.generation.planning.stage import Stage
from capstan.plans import rank_link
from capstan.storage import Slab
from capstan.transport import Ledger, Stopwatch
from capstan.transport.group import Transfer

WAITING = "waiting for other ranks"


class Exchange:
    """Sends and receives for one stage. Turns must be the same on all ranks."""

    def __init__(
        self, stage: Stage, *, outbox_bytes: int, waves: int, device: torch.device, ledger: Ledger
    ) -> None:
        self._group, self._last_rank, self._waves = stage.group, stage.last_rank, waves
        self._ledger = ledger
        self._clock = Stopwatch(ledger, torch.device("cpu"))
        self._outbox = Slab("hidden states for the next rank", outbox_bytes, device=device)
        self._filled = 0
        self._leaving: list[Transfer] = []  # hidden states of this turn or the one before
        self._telling: deque[list[Transfer]] = deque()  # outcomes of turns past

    @property
    def has_front(self) -> bool:
        """Whether hidden states begin here."""
        return self._group.is_first

    @property
    def has_back(self) -> bool:
        """Whether hidden states end here."""
        return self._group.is_last

    @property
    def device_bytes(self) -> int:
        return self._outbox.size_bytes

    def begin(self) -> None:
        """A turn begins."""
        self._filled = 0

    def receive(self, hidden: Tensor) -> None:
        """Fill a batch's hidden states with those of the rank before."""
        source, run = self._group.rank - 1, _bytes(hidden)
        with self._clock.time(WAITING):
            self._group.receive(run, source).wait()
        self._ledger.count(rank_link(source, self._group.rank), "activations", run.numel())

    def send(self, hidden: Tensor) -> None:
        """Hand a batch's hidden states to the next rank; they are copied first."""
        target, run = self._group.rank + 1, _bytes(hidden)
        if not self._filled:
            self._wait(self._leaving)
            self._leaving = []
        place = self._outbox.bytes[self._filled : self._filled + run.numel()]
        self._filled += run.numel()
        place.copy_(run)
        self._leaving.append(self._group.send(place, target))
        self._ledger.count(rank_link(self._group.rank, target), "activations", run.numel())

    def tell(self, values: Sequence[float]) -> None:
        """On the last rank: tell all others the outcomes of a turn."""
        numbers = torch.tensor(values, dtype=torch.float64)
        sent = [self._group.send(numbers, rank) for rank in self._group.others] if values else []
        self._telling.append(sent)
        for rank in self._group.others:
            self._ledger.count(rank_link(self._last_rank, rank), "outcomes", OUTCOME_BYTES * len(values))
        if len(self._telling) > self._waves:  # what was told then has been asked for since
            self._wait(self._telling.popleft())

    def hear(self, count: int) -> list[float]:
        """On all others: the outcomes of a turn, `count` numbers."""
        numbers = torch.empty(count, dtype=torch.float64)
        if count:
            with self._clock.time(WAITING):
                self._group.receive(numbers, self._last_rank).wait()
        link = rank_link(self._last_rank, self._group.rank)
        self._ledger.count(link, "outcomes", OUTCOME_BYTES * count)
        return numbers.tolist()

    def finish(self) -> None:
        """Wait until everything sent has been taken over."""
        for transfers in (self._leaving, *self._telling):
            self._wait(transfers)

    def _wait(self, transfers: Sequence[Transfer]) -> None:
        if transfers:
            with self._clock.time(WAITING):
                for transfer in transfers:
                    transfer.wait()

    def close(self) -> None:
        """Give the memory back."""
        self._outbox.close()


def _bytes(hidden: Tensor) -> Tensor:
    return hidden.view(-1).view(torch.uint8)
