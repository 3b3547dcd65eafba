"""What a gradient does to a row: torch's formulas, applied to the rows that a batch touched.

A row is `embedding | state`. Its gradient is the sum over the batch's occurrences of its ID and is applied
once. Rows that a batch did not touch stay as they are, as with torch's sparse gradients: momentum and
Adam's averages do not decay meanwhile.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from capstan.errors import UsageError, unknown_name
from capstan.recommendation.kernels import UpdateFields


@dataclass(frozen=True, kw_only=True)
class RowOptimizer(ABC):
    """`lr`; `weight_decay` is added to the gradient times the row; `bound` clips every element afterwards."""

    lr: float = 1e-2
    weight_decay: float = 0.0
    bound: float | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise UsageError(f"{name} is {getattr(self, name)}; give a finite number from 0 up.")
        if self.bound is not None and not self.bound > 0:
            raise UsageError(f"bound is {self.bound}; give a number above 0, or None for no bound.")

    @property
    def initial_state(self) -> float:
        """What every float of a new row's state is."""
        return 0.0

    @abstractmethod
    def state_floats(self, dim: int) -> int:
        """Floats of state beside a row of `dim`."""

    def fields(self, step: int, lr: float) -> UpdateFields:
        """What the kernel needs for update number `step`, from 1."""
        named = {"weight_decay": self.weight_decay, "bound": self.bound or 0.0}
        return UpdateFields(**named | self._rule(step, lr))

    @abstractmethod
    def _rule(self, step: int, lr: float) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Sgd(RowOptimizer):
    """m = momentum m + g; w -= lr m. Source: torch.optim.SGD, dampening 0, not Nesterov."""

    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_share("momentum", self.momentum)

    def state_floats(self, dim: int) -> int:
        return dim if self.momentum else 0

    def _rule(self, step: int, lr: float) -> dict[str, Any]:
        return {"kind": 0, "lr": lr, "momentum": self.momentum}


@dataclass(frozen=True, kw_only=True)
class Adagrad(RowOptimizer):
    """a += g²; w -= lr g / (√a + eps). Source: torch.optim.Adagrad, lr_decay 0.

    `order="persia"`: w -= lr g / √(a + eps) with the accumulator from before, then a += g²; give it an
    `initial_accumulator` above 0, as Persia does (0.01), or the first update divides by √eps.
    """

    initial_accumulator: float = 0.0
    eps: float = 1e-10
    order: str = "torch"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_from_0(self, "initial_accumulator", "eps")
        if self.order not in ("torch", "persia"):
            raise unknown_name("order of Adagrad", self.order, ("torch", "persia"))
        if self.order == "persia" and self.initial_accumulator == 0:
            raise UsageError(
                "Adagrad in Persia's order divides by the accumulator from before, and "
                "initial_accumulator is 0. Give 0.01, as Persia does."
            )

    @property
    def initial_state(self) -> float:
        return self.initial_accumulator

    def state_floats(self, dim: int) -> int:
        return dim

    def _rule(self, step: int, lr: float) -> dict[str, Any]:
        return {"kind": 1 if self.order == "torch" else 4, "lr": lr, "eps": self.eps}


@dataclass(frozen=True, kw_only=True)
class RowWiseAdagrad(RowOptimizer):
    """a += mean(g²), one number a row; w -= lr g / (√a + eps). Source: FBGEMM's exact row-wise Adagrad."""

    initial_accumulator: float = 0.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_from_0(self, "initial_accumulator", "eps")

    @property
    def initial_state(self) -> float:
        return self.initial_accumulator

    def state_floats(self, dim: int) -> int:
        return 1

    def _rule(self, step: int, lr: float) -> dict[str, Any]:
        return {"kind": 2, "lr": lr, "eps": self.eps}


@dataclass(frozen=True, kw_only=True)
class Adam(RowOptimizer):
    """m += (1-β1)(g-m); v += (1-β2)(g²-v); w -= lr √(1-β2ᵗ)/(1-β1ᵗ) m / (√v + eps).

    t counts the table's updates from 1. Source: torch.optim.SparseAdam.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_from_0(self, "eps")
        for beta in self.betas:
            _require_share("beta", beta)

    def state_floats(self, dim: int) -> int:
        return 2 * dim

    def _rule(self, step: int, lr: float) -> dict[str, Any]:
        first, second = self.betas
        corrected = lr * math.sqrt(1 - second**step) / (1 - first**step)
        return {
            "kind": 3,
            "lr": corrected,
            "eps": self.eps,
            "first_share": 1 - first,
            "second_share": 1 - second,
        }


OPTIMIZERS: dict[str, type[RowOptimizer]] = {
    "sgd": Sgd,
    "adagrad": Adagrad,
    "row_wise_adagrad": RowWiseAdagrad,
    "adam": Adam,
}


def _require_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise UsageError(f"{name} is {value}; give a number from 0 to below 1.")


def _require_from_0(optimizer: RowOptimizer, *names: str) -> None:
    for name in names:
        value = getattr(optimizer, name)
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{name} is {value}; give a finite number from 0 up.")
