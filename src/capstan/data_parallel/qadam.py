"""Adam whose momentum crosses in one bit once its variance has settled."""

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from capstan.data_parallel.centralised import Centralised
from capstan.errors import UsageError

if TYPE_CHECKING:
    from capstan.data_parallel.buckets import Bucket
    from capstan.data_parallel.replica import Replica

VARIANCE_FLOOR = 0.01


class QAdam(torch.optim.Adam):
    """torch's Adam for `warmup_steps` steps; then the variance v is frozen, with its bias correction.

        m <- mean over ranks of Q(b1 m + (1 - b1) g);  x -= lr / (1 - b1^t) m / (sqrt(v / (1 - b2^T)) + eps)

    with T = warmup_steps. Without an algorithm that averages momenta it is that optimizer for one rank.

    Args:
        variance_floor: when v is frozen no element is left below this share of its tensor's mean: one bit
        says
            of every element that it moves, and where v is 0 that would be without bound.

    Source: 1-bit Adam, arXiv 2102.02888; BAGUA's qadam. Differs from BAGUA: stage and update rule change
    with the same step, so no gradient is lost; the correction of a frozen v is frozen; betas are each
    group's own; v has a floor.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        warmup_steps: int = 100,
        variance_floor: float = VARIANCE_FLOOR,
    ) -> None:
        if warmup_steps < 1:
            raise UsageError(f"The variance needs at least a step to be known, found {warmup_steps}.")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.warmup_steps, self.variance_floor = warmup_steps, variance_floor
        for group in self.param_groups:
            group.setdefault("num_steps", 0)  # kept where state_dict saves it
        self.has_momenta = False

    @property
    def num_steps(self) -> int:
        """Steps taken."""
        return int(self.param_groups[0]["num_steps"])

    @property
    def is_frozen(self) -> bool:
        """Whether the next step is with a frozen variance."""
        return self.num_steps >= self.warmup_steps

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; `closure` as in torch."""
        if self.is_frozen:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._step_frozen()
        else:
            loss = super().step(closure)
        for group in self.param_groups:
            group["num_steps"] += 1
        if self.num_steps == self.warmup_steps:
            self._freeze()
        return loss

    def update_momentum(self, parameter: Parameter) -> Tensor:
        """m <- b1 m + (1 - b1) g, with this rank's gradient; returns m itself."""
        group = self._group_of(parameter)
        beta, momentum = group["betas"][0], self.momentum(parameter)
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        return momentum.mul_(beta).add_(gradient, alpha=1 - beta)

    def momentum(self, parameter: Parameter) -> Tensor:
        """The parameter's m."""
        state = self.state[parameter]
        if "exp_avg" not in state:  # it had no gradient while v was learned
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.full_like(parameter, self._group_of(parameter)["eps"] ** 2)
        momentum: Tensor = state["exp_avg"]
        return momentum

    def _group_of(self, parameter: Parameter) -> dict[str, Any]:
        return next(
            group for group in self.param_groups if any(each is parameter for each in group["params"])
        )

    def _freeze(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                variance = self.state[parameter].get("exp_avg_sq")
                if variance is not None:
                    least = self.variance_floor * variance.mean()
                    variance.copy_(torch.maximum(variance, least.clamp(min=group["eps"] ** 2)))

    def _step_frozen(self) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            rate = group["lr"] / (1 - beta1 ** (group["num_steps"] + 1))
            correction = math.sqrt(1 - beta2**self.warmup_steps)
            for parameter in group["params"]:
                if parameter.grad is None and not self.has_momenta:
                    continue
                momentum = self.momentum(parameter) if self.has_momenta else self.update_momentum(parameter)
                spread = self.state[parameter]["exp_avg_sq"].sqrt().div_(correction).add_(group["eps"])
                parameter.addcdiv_(momentum, spread, value=-rate)
        self.has_momenta = False


class QAdamMomenta(Centralised):
    """Gradients are averaged in full precision while `QAdam` warms up; afterwards momenta are, in few bits.

    Args:
        bits: 1, with error feedback at worker and server, or 8, without.
    """

    name = "qadam"

    def __init__(self, bits: Literal[1, 8] = 1) -> None:
        if bits not in (1, 8):
            raise UsageError(f"qadam sends 1 or 8 bits, found {bits}.")
        super().__init__("sign:1024" if bits == 1 else "group8:512:float32", error_feedback=bits == 1)
        self._plain = Centralised()

    def start(self, replica: "Replica") -> None:
        super().start(replica)
        if not isinstance(replica.optimizer, QAdam):
            raise UsageError(
                f"qadam averages momenta of capstan.data_parallel.QAdam, found "
                f"{type(replica.optimizer).__name__}. "
                "Make that the optimizer, or take onebit, which works with any."
            )
        self._optimizer = replica.optimizer

    def exchange(self, talk: Any, values: Tensor, shapes: Any, key: str) -> Any:
        if self._optimizer.is_frozen:
            return super().exchange(talk, values, shapes, key)
        return self._plain.exchange(talk, values, shapes, key)

    @torch.no_grad()
    def before_gradients(self, bucket: "Bucket") -> None:
        if self._optimizer.is_frozen:
            for view, parameter in zip(bucket.views, bucket.parameters, strict=True):
                view.copy_(self._optimizer.update_momentum(parameter))

    @torch.no_grad()
    def after_gradients(self) -> None:
        if self._optimizer.is_frozen:
            for bucket in self.replica.gradient_buckets():
                for view, parameter in zip(bucket.views, bucket.parameters, strict=True):
                    self._optimizer.momentum(parameter).copy_(view)
            self._optimizer.has_momenta = True
