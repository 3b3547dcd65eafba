"""Ranks train alone for some steps, then average how far they have come."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from capstan.codecs import Compressor, codec_from_name
from capstan.data_parallel.algorithm import Algorithm
from capstan.errors import UsageError
from capstan.transport.collectives import average

if TYPE_CHECKING:
    from capstan.data_parallel.replica import Replica


class LocalSGD(Algorithm):
    """Every `every` steps, from the last common weights A and one's own x:

        d = mean of Q(A - x);  v = momentum v + d;  A -= lr (d + momentum v)     (Nesterov; else lr v)

    and all go on from A. With lr 1 and no momentum that is the mean of the weights.

    Args:
        every: steps from one exchange to the next.
        lr, momentum, nesterov: of the outer optimizer.
        codec, error_feedback: in how many bits the differences cross.

    Source: local SGD, arXiv 1805.09767.
    """

    name = "local_sgd"

    def __init__(
        self,
        every: int = 8,
        *,
        lr: float = 1.0,
        momentum: float = 0.0,
        nesterov: bool = False,
        codec: str = "identity",
        error_feedback: bool = False,
    ) -> None:
        if every != int(every) or every < 1:
            raise UsageError(f"Exchanges are a whole number of steps apart, at least 1; found every={every}.")
        self.every, self.lr, self.momentum, self.nesterov = every, lr, momentum, nesterov
        self.codec, self.error_feedback = codec_from_name(codec), error_feedback
        self._steps = 0

    @property
    def description(self) -> str:
        outer = f"lr {self.lr}, momentum {self.momentum}{' (Nesterov)' if self.nesterov else ''}"
        feedback = " with error feedback" if self.error_feedback else ""
        return f"{self.name}: every {self.every}, {outer}, {self.codec.name}{feedback}"

    def start(self, replica: "Replica") -> None:
        super().start(replica)
        self._compressor = Compressor(self.codec, error_feedback=self.error_feedback, salt=replica.group.rank)
        self._buckets = replica.weight_buckets()
        self._anchors = [bucket.take_weights().clone() for bucket in self._buckets]
        self._velocities = [torch.zeros_like(anchor) for anchor in self._anchors]

    def before_forward(self) -> None:
        # After an exchange the weights are the anchors, unless others were loaded, on all ranks, since.
        if self._steps % self.every == 0:
            for bucket, anchor in zip(self._buckets, self._anchors, strict=True):
                bucket.take_weights(anchor)

    def after_step(self) -> None:
        self._steps += 1
        if self._steps % self.every:
            return
        pending = []
        for bucket, anchor in zip(self._buckets, self._anchors, strict=True):
            values = bucket.take_weights().neg_().add_(anchor)
            pending.append(
                self.replica.submit(
                    partial(average, values=values, compressor=self._compressor, key=bucket.key),
                    about=bucket.key,
                )
            )
        states = zip(pending, self._buckets, self._anchors, self._velocities, strict=True)
        for waiting, bucket, anchor, velocity in states:
            waiting.wait()
            velocity.mul_(self.momentum).add_(bucket.flat)
            step = bucket.flat.add_(velocity, alpha=self.momentum) if self.nesterov else velocity
            anchor.sub_(step, alpha=self.lr)
            bucket.put_weights(anchor)

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self._steps,
            "compressor": self._compressor.state_dict(),
            "anchors": [each.clone() for each in self._anchors],
            "velocities": [each.clone() for each in self._velocities],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]
        self._compressor.load_state_dict(state["compressor"])
        for mine, saved in ((self._anchors, "anchors"), (self._velocities, "velocities")):
            for target, source in zip(mine, state[saved], strict=True):
                target.copy_(source)


class DiLoCo(LocalSGD):
    """Local steps with an outer Nesterov momentum; differences in 8 bits with error feedback.

    Source: DiLoCo, arXiv 2311.08105: outer learning rate 0.7, momentum 0.9.
    """

    name = "diloco"

    def __init__(
        self,
        every: int = 64,
        *,
        lr: float = 0.7,
        momentum: float = 0.9,
        nesterov: bool = True,
        codec: str = "group8:512:float32",
        error_feedback: bool = True,
    ) -> None:
        super().__init__(
            every, lr=lr, momentum=momentum, nesterov=nesterov, codec=codec, error_feedback=error_feedback
        )
