"""What an algorithm of data-parallel training is: what happens to gradients and weights, and when."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from capstan.errors import UsageError
from capstan.transport import Conversation, Group, Operation

if TYPE_CHECKING:
    from capstan.data_parallel.replica import Replica


class Algorithm:
    """One rank's side of an algorithm. `wrap` calls these at their moments; each may do nothing.

    An algorithm that `exchanges_gradients` has its buckets of gradients replaced by what `exchange` makes of
    them, while backward goes on with the next ones. Others work on the weights, around the optimizer's step.

    Where `steps_wait` is off no step waits for another rank's. With one that `can_spare_inputs` a rank
    without inputs can take part in what the others exchange, see `Replica.join`.
    """

    name: ClassVar[str]
    exchanges_gradients: ClassVar[bool] = False
    needs_optimizer: ClassVar[bool] = True
    steps_wait: ClassVar[bool] = True
    can_spare_inputs: ClassVar[bool] = True

    replica: "Replica"
    group: Group

    @property
    def description(self) -> str:
        """The name and every setting that ranks must agree on."""
        return self.name

    @property
    def holds_gradients(self) -> bool:
        """Whether, for now, gradients stay this rank's own, to be exchanged when the optimizer steps."""
        return False

    @property
    def carries_all_values(self) -> bool:
        """Whether infinities and NaN reach the other ranks as they are."""
        return True

    @property
    def all_hear_all(self) -> bool:
        """Whether in an exchange of gradients every rank hears, directly or not, from every other."""
        return True

    def start(self, replica: "Replica") -> None:
        """Once, when all ranks have the same weights."""
        self.replica = replica
        self.join(replica.group)

    def join(self, group: Group) -> None:
        """Once, before anything is exchanged; all ranks call it. All that one that exchanges gradients needs
        to know of the others, so that it works behind a hook, too."""
        self.group = group

    def exchange(
        self, talk: Conversation, values: Tensor, shapes: Sequence[tuple[int, ...]], key: str
    ) -> Operation:
        """Replace the flat gradients of a bucket by what all ranks shall use; runs in the communication
        thread.
        """
        raise UsageError(f"{self.name} does not exchange gradients: use it through wrap().")

    def rescale(self, factor: float) -> None:
        """The gradients that come are `factor` times as large, because the loss is scaled by more or less."""

    def after_gradients(self) -> None:
        """A backward pass has ended, and all gradients were exchanged, unless they are held."""

    def before_forward(self) -> None:
        """The first forward pass of a training step begins."""

    def before_step(self) -> None:
        """The optimizer is about to change the weights."""

    def after_step(self) -> None:
        """The optimizer has changed the weights."""

    def paused(self) -> AbstractContextManager[None]:
        """While this lasts nothing runs in the background; all ranks enter it."""
        return nullcontext()

    def close(self) -> None:
        """Training is over."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on: tensors, numbers, text."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
