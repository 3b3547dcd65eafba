"""By how much a loss is multiplied before its backward pass, so that residuals keep step with it."""

import math
import sys
from collections.abc import Callable

from torch.amp import GradScaler

from capstan.errors import UsageError
from capstan.transport import Group


class LossScale:
    """The scale of the gradients that an algorithm sees.

    Args:
        ask: what the loss is multiplied by; None: nothing, until a GradScaler is seen to step.
    """

    def __init__(self, ask: Callable[[], float] | None) -> None:
        self._ask = ask
        self._scaler: GradScaler | None = None
        self.last: float | None = None

    def change(self) -> float:
        """How many times the scale of before this one is; 1 where there was none."""
        if self._ask is None:
            return 1.0
        scale = float(self._ask())
        if not (math.isfinite(scale) and scale > 0):
            raise UsageError(f"A loss is scaled by a finite number above 0, found loss_scale() = {scale}.")
        before, self.last = self.last, scale
        return 1.0 if before is None else scale / before

    def follow(self, factor: float) -> None:
        """Other ranks' scale has changed, and this one is to be as theirs."""
        self.last = None if self.last is None else self.last * factor

    def notice_scaler(self) -> None:
        """Called inside an optimizer's step: ask the GradScaler that steps it from now on.

        It steps only where all gradients are finite, so before the first residual it has not been missed.
        """
        if self._scaler is not None:
            return
        self._scaler = _stepping_scaler()
        if self._ask is None and self._scaler is not None:
            self._ask = self._scaler.get_scale
            self.last = float(self._ask()) if self.last is None else self.last

    def take_over(self, group: Group, source: int) -> None:
        """Give all ranks' GradScalers the state of one rank's; all call it.

        Raises:
            UsageError: a rank has not stepped yet, so its scaler is not known.
        """
        states = group.gather(None if self._scaler is None else self._scaler.state_dict())
        if states[source] is None:
            return
        if None in states:
            raise UsageError(
                f"Rank {states.index(None)} has taken no step yet, so its GradScaler cannot be given the "
                "scale of the others. Give every rank a batch, or train without a GradScaler."
            )
        if self._scaler is not None and group.rank != source:
            self._scaler.load_state_dict(states[source])


def _stepping_scaler() -> GradScaler | None:
    # An optimizer is not told who steps it, and a scaler tells nobody that it does.
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is GradScaler.step.__code__:
            scaler: GradScaler = frame.f_locals["self"]
            return scaler
        frame = frame.f_back  # type: ignore[assignment]  # None at the end
    return None
