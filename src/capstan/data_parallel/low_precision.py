"""Decentralised training in low precision: neighbours on a ring tell each other what changed, in few bits."""

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from capstan.codecs import codec_from_name
from capstan.data_parallel.algorithm import Algorithm
from capstan.data_parallel.peers import neighbours
from capstan.transport import Coder, Conversation, Operation

if TYPE_CHECKING:
    from capstan.data_parallel.buckets import Bucket
    from capstan.data_parallel.replica import Replica


class LowPrecisionDecentralised(Algorithm):
    """After the optimizer's step to x, with W this rank's replica and L, R its neighbours':

        z = x + L/3 + R/3 - 5/3 W;  all three add the decoded Q(z) of theirs;  x = W

    Every rank's W and what its neighbours hold of it are equal, bit for bit, for ever.

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
        self._coder = Coder(self.codec, salt=replica.group.rank)
        self._buckets = replica.weight_buckets()
        self._replicas = [[bucket.take_weights().clone() for _ in range(3)] for bucket in self._buckets]

    def after_step(self) -> None:
        pending = []
        for bucket, replicas in zip(self._buckets, self._replicas, strict=True):
            values = bucket.take_weights()
            pending.append(
                self.replica.submit(
                    partial(self._tell, bucket=bucket, values=values, replicas=replicas),
                    about=bucket.key,
                )
            )
        for waiting, bucket, (own, _, _) in zip(pending, self._buckets, self._replicas, strict=True):
            waiting.wait()
            bucket.put_weights(own)

    def _tell(
        self, talk: Conversation, bucket: "Bucket", values: Tensor, replicas: list[Tensor]
    ) -> Operation:
        own, left, right = replicas
        before, after = neighbours(talk.rank, talk.size)
        difference = values.add_(left, alpha=1 / 3).add_(right, alpha=1 / 3).sub_(own, alpha=5 / 3)
        size = self._coder.size(difference)
        swap = talk.round("swap")
        payload = swap.to(sorted({before, after}), size)
        self._coder.encode(difference, payload, key=bucket.key)
        arriving = {rank: swap.take(rank, size) for rank in sorted({before, after})}
        yield swap
        for replica, source in ((own, payload), (left, arriving[before]), (right, arriving[after])):
            change = difference.new_empty(difference.shape)
            self._coder.decode(source, change)
            replica.add_(change)

    def state_dict(self) -> dict[str, Any]:
        replicas = [[each.clone() for each in three] for three in self._replicas]
        return {"coder": self._coder.state_dict(), "replicas": replicas}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._coder.load_state_dict(state["coder"])
        for mine, saved in zip(self._replicas, state["replicas"], strict=True):
            for target, source in zip(mine, saved, strict=True):
                target.copy_(source)
