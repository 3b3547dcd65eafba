"""Each rank averages its weights with some others' instead of gradients with all."""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from capstan.codecs import Compressor, Identity
from capstan.data_parallel.algorithm import Algorithm
from capstan.data_parallel.peers import shift_one
from capstan.errors import UsageError, unknown_name
from capstan.transport import Conversation, Operation, Pending
from capstan.transport.collectives import average

if TYPE_CHECKING:
    from capstan.data_parallel.replica import Replica

Peers = Literal["shift_one", "all"]


class Decentralised(Algorithm):
    """Weights are averaged with one peer, or all, while forward and backward run; then comes the step.

        x_half = (x_t + x_t of the peer) / 2          ("shift_one")     or the mean over all ("all")
        x_{t+1} = x_half - step(gradient at x_t)

    Args:
        peers: "shift_one", another peer in each round (`peers.shift_one`), or "all".
        every: steps from one exchange to the next.

    Source: BAGUA's decentralized, after arXiv 1705.09056. Differs: "shift_one" is the default, since
    "all" sends as much as an all-reduce; odd numbers of ranks are served, one sitting out in each round.
    """

    name = "decentralized"

    def __init__(self, peers: Peers = "shift_one", *, every: int = 1) -> None:
        if peers not in ("shift_one", "all"):
            raise unknown_name("choice of peers", peers, ("shift_one", "all"))
        if every != int(every) or every < 1:
            raise UsageError(f"Exchanges are a whole number of steps apart, at least 1; found every={every}.")
        self.peers, self.every = peers, every
        self._exact = Compressor(Identity())
        self._steps = self._rounds = 0
        self._pending: list[Pending] = []
        self._before: list[Tensor] = []  # the weights that are under way

    @property
    def description(self) -> str:
        return f"{self.name}: {self.peers}, every {self.every}"

    def start(self, replica: "Replica") -> None:
        super().start(replica)
        self._buckets = replica.weight_buckets()

    def before_forward(self) -> None:
        if self._steps % self.every == 0 and not self._pending:
            round_number = self._rounds
            self._before = []
            for bucket in self._buckets:
                values = bucket.take_weights()
                self._before.append(values.clone())
                self._pending.append(
                    self.replica.submit(
                        partial(self._mix, values=values, round_number=round_number), about=bucket.key
                    )
                )
            self._rounds += 1

    def before_step(self) -> None:
        self._take_over()

    def after_step(self) -> None:
        self._take_over()  # with a closure forward has run inside the step
        self._steps += 1

    @torch.no_grad()
    def _take_over(self) -> None:
        for pending, bucket, before in zip(self._pending, self._buckets, self._before, strict=False):
            pending.wait()
            for parameter, mean, old in zip(
                bucket.parameters, bucket.views, bucket.views_of(before), strict=True
            ):
                if torch.equal(parameter, old):
                    parameter.copy_(mean)
                else:  # moved in the meantime, by another optimizer or by the one whose step this is
                    parameter.add_(mean - old)
        self._pending = []

    def _mix(self, talk: Conversation, values: Tensor, round_number: int) -> Operation:
        if self.peers == "all":
            return average(talk, values, compressor=self._exact, key="weights")
        return average_with(talk, values, shift_one(talk.rank, talk.size, round_number), self._exact)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "rounds": self._rounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps, self._rounds = state["steps"], state["rounds"]


def average_with(talk: Conversation, values: Tensor, peer: int | None, compressor: Compressor) -> Operation:
    """Replace values by the mean of one's own and a peer's: the same bits at both, so their mean is kept."""
    if peer is None:
        return
    swap = talk.round("swap")
    compressor.encode(values, swap.to(peer, compressor.size(values)), key="weights")
    payload = swap.take(peer, compressor.size(values))
    yield swap
    theirs = values.new_empty(values.shape)
    compressor.decode(payload, theirs)
    values.add_(theirs).mul_(0.5)
