"""By how much a loss is multiplied before its backward pass, so that residuals keep step with it."""

import math
import sys
from collections.abc import Callable

from torch.amp import GradScaler

from capstan.errors import UsageError


class LossScale:
    """The scale of the gradients that an algorithm sees.

    Args:
        ask: what the loss is multiplied by; None: nothing, until a GradScaler is seen to step.
    """

    def __init__(self, ask: Callable[[], float] | None) -> None:
        self._ask = ask
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

    def notice_scaler(self) -> None:
        """Called inside an optimizer's step: ask the GradScaler that steps it from now on.

        It steps only where all gradients are finite, so before the first residual it has not been missed.
        """
        if self._ask is None and (scaler := _stepping_scaler()) is not None:
            self._ask = scaler.get_scale
            self.last = float(self._ask()) if self.last is None else self.last


def _stepping_scaler() -> GradScaler | None:
    # An optimizer is not told who steps it, and a scaler tells nobody that it does.
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is GradScaler.step.__code__:
            scaler: GradScaler = frame.f_locals["self"]
            return scaler
        frame = frame.f_back  # type: ignore[assignment]  # None at the end
    return None
