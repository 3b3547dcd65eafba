"""Averages of gradients over all ranks in each step, in full or in low precision."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from capstan.codecs import Compressor, codec_from_name
from capstan.data_parallel.algorithm import Algorithm
from capstan.data_parallel.machines import machines_of
from capstan.errors import UsageError, unknown_name
from capstan.transport import Conversation, Group, Operation
from capstan.transport.collectives import average, average_by_machine, average_by_ring

Route = Literal["direct", "machines", "ring"]
ROUTES = ("direct", "machines", "ring")


class Centralised(Algorithm):
    """g = mean of what all ranks have, encoded on both ways.

    Args:
        codec: in how many bits gradients cross.
        error_feedback: whether what a codec loses is added next time, at the worker and at the server side.
        route: "direct" to all others; "machines": first within a machine, in full precision; "ring":
        PyTorch's
            all-reduce, for the identity only, with DDP's bits.
        machines: the ranks of each machine, for that route; by default those that share a host name.
    """

    name = "centralised"
    exchanges_gradients = True
    needs_optimizer = False
    default_codec: ClassVar[str] = "identity"
    default_feedback: ClassVar[bool] = False

    def __init__(
        self,
        codec: str | None = None,
        *,
        error_feedback: bool | None = None,
        route: Route = "direct",
        machines: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if route not in ROUTES:
            raise unknown_name("route", route, ROUTES)
        self.codec = codec_from_name(codec or self.default_codec)
        self.error_feedback = self.default_feedback if error_feedback is None else error_feedback
        self.route, self._machines = route, machines
        if route == "ring" and self.codec.name != "identity":
            raise UsageError(
                f"PyTorch's ring cannot carry {self.codec.name}: it adds what it gets. Use the direct route."
            )
        self._compressor: Compressor | None = None

    @property
    def description(self) -> str:
        feedback = " with error feedback" if self.error_feedback else ""
        return f"{self.name}: {self.codec.name}{feedback}, {self.route}"

    @property
    def carries_all_values(self) -> bool:
        return self.codec.name == "identity"

    @property
    def all_hear_all(self) -> bool:
        return self.route != "ring"

    def exchange(
        self, talk: Conversation, values: Tensor, shapes: Sequence[tuple[int, ...]], key: str
    ) -> Operation:
        if self.route == "ring":
            return average_by_ring(talk, values)
        if self.route == "machines":
            return average_by_machine(
                talk, values, compressor=self._compressor_of(talk.rank), key=key, machines=self.machines
            )
        return average(talk, values, compressor=self._compressor_of(talk.rank), key=key)

    @property
    def machines(self) -> Sequence[Sequence[int]]:
        """The ranks of each machine, on the route through machines."""
        assert self._machines is not None, "join() has found them"
        return self._machines

    def join(self, group: Group) -> None:
        super().join(group)
        if self.route == "machines":
            self._machines = machines_of(group) if self._machines is None else self._machines
            listed = sorted(rank for ranks in self._machines for rank in ranks)
            if listed != list(range(group.size)):
                raise UsageError(
                    f"machines= lists each of the ranks 0 to {group.size - 1} once, found {self._machines}."
                )

    def rescale(self, factor: float) -> None:
        if self._compressor is not None:
            self._compressor.rescale(factor)

    def _compressor_of(self, rank: int) -> Compressor:
        if self._compressor is None:
            self._compressor = Compressor(self.codec, error_feedback=self.error_feedback, salt=rank)
        return self._compressor

    def state_dict(self) -> dict[str, Any]:
        return {} if self._compressor is None else self._compressor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._compressor_of(self.group.rank).load_state_dict(state)


class GradientAllReduce(Centralised):
    """Plain averages in full precision: the off position of every relaxation."""

    name = "gradient_allreduce"


class ByteGrad(Centralised):
    """8 bits an element, in blocks of 512 with a minimum and step each.

    Source: BAGUA's ByteGrad. Differs: one minimum and maximum for a whole chunk there, which makes errors of
    several percent and wraps at times; `codec="minmax8"` is that one.
    """

    name = "bytegrad"
    default_codec = "group8:512:float32"


class OneBit(Centralised):
    """Signs with a scale for each block of 1024, and error feedback on both sides.

    Source: scaled signs with error feedback, arXiv 1901.09847; both sides as in 1-bit Adam, arXiv 2102.02888.
    """

    name = "onebit"
    default_codec = "sign:1024"
    default_feedback = True


class TopKGradients(Centralised):
    """The largest hundredth, with error feedback on both sides."""

    name = "topk"
    default_codec = "topk:0.01"
    default_feedback = True


class RandomKGradients(Centralised):
    """A random hundredth, with error feedback on both sides."""

    name = "randomk"
    default_codec = "randomk:0.01"
    default_feedback = True
