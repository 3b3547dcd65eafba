"""Decentralised training in low precision: neighbours on a ring tell each other what changed, in few bits."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from capstan.codecs import Delta, codec_from_name
from capstan.data_parallel.algorithm import Algorithm
from capstan.data_parallel.buckets import Bucket
from capstan.data_parallel.peers import neighbours
from capstan.transport import Conversation, Operation

if TYPE_CHECKING:
    from capstan.data_parallel.replica import Replica


class LowPrecisionDecentralised(Algorithm):
    """After the optimizer's step to x, with W this rank's replica and L, R its neighbours':

        v = x + L/3 + R/3 - 2/3 W;  all three add the decoded Q(v - W) of theirs;  x = W

    Every rank's W and what its neighbours hold of it are equal, bit for bit, for ever: each is one end of a
    `Delta`.

    Of 16-bit weights the replicas are in float32, and x is what was held plus how far the optimizer moved the
    weights: changes below their rounding add up.

    Source: DCD-PSGD, arXiv 1803.06443, as BAGUA's low_precision_decentralized.
    Differs: in blocks of 512 rather than one range a bucket; of two ranks each is told once, not twice.
    """

    name = "low_precision_decentralized"

    def __init__(self, codec: str = "group8:512:float32") -> None:
        self.codec = codec_from_name(codec)

    @property
    def description(self) -> str:
        return f"{self.name}: {self.codec.name}"

    def start(self, replica: "Replica") -> None:
        super().start(replica)
        self._buckets = replica.weight_buckets()
        # What this rank has told, and what it has heard from its neighbours before and after it.
        self._ends = {name: Delta(self.codec, salt=replica.group.rank) for name in ("own", "left", "right")}
        for bucket in self._buckets:
            for end in self._ends.values():
                end.start(bucket.key, _at_least_float32(bucket.take_weights()))

    def before_forward(self) -> None:
        # After a step the weights are what is held, unless others were loaded, on all ranks, since.
        for bucket in self._buckets:
            weights = bucket.take_weights()
            if not torch.equal(weights, self._ends["own"].held(bucket.key).to(weights.dtype)):
                for end in self._ends.values():
                    end.start(bucket.key, _at_least_float32(weights))

    def after_step(self) -> None:
        pending = [
            self.replica.submit(
                partial(self._tell, key=bucket.key, values=self._moved(bucket)), about=bucket.key
            )
            for bucket in self._buckets
        ]
        for waiting, bucket in zip(pending, self._buckets, strict=True):
            waiting.wait()
            bucket.put_weights(self._ends["own"].held(bucket.key))

    def _moved(self, bucket: Bucket) -> Tensor:
        """x, which may be overwritten."""
        weights, held = bucket.take_weights(), self._ends["own"].held(bucket.key)
        if weights.dtype == held.dtype:
            return weights
        return weights.to(held.dtype).sub_(held.to(weights.dtype)).add_(held)

    def _tell(self, talk: Conversation, key: str, values: Tensor) -> Operation:
        own, left, right = self._ends["own"], self._ends["left"], self._ends["right"]
        before, after = neighbours(talk.rank, talk.size)
        values.add_(left.held(key), alpha=1 / 3).add_(right.held(key), alpha=1 / 3)
        values.sub_(own.held(key), alpha=2 / 3)
        size = own.size(values)
        swap = talk.round("swap")
        own.encode(values, swap.to(sorted({before, after}), size), key=key)
        arriving = {rank: swap.take(rank, size) for rank in sorted({before, after})}
        yield swap
        left.decode(arriving[before], key=key)
        right.decode(arriving[after], key=key)

    def state_dict(self) -> dict[str, Any]:
        return {name: end.state_dict() for name, end in self._ends.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, end in self._ends.items():
            end.load_state_dict(state[name])


def _at_least_float32(weights: Tensor) -> Tensor:
    return weights.to(torch.promote_types(weights.dtype, torch.float32))
