"""Adam whose momentum crosses in one bit once its variance has settled."""

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from capstan.data_parallel.asynchronous import agreement
from capstan.data_parallel.centralised import Centralised
from capstan.data_parallel.exchange import exchange_bucket
from capstan.errors import UsageError

if TYPE_CHECKING:
    from capstan.data_parallel.replica import Replica

VARIANCE_FLOOR = 0.01


class QAdam(torch.optim.Adam):
    """torch's Adam for `warmup_steps` steps; then the variance v is frozen, with its bias correction.

        m = b1 m + (1 - b1) g;  u = m / (sqrt(v / (1 - b2^T)) + eps), within +-max(1, (1 - b1) / sqrt(1 - b2))
        u <- mean over ranks of Q(u);  m <- u times what divided it;  x -= lr / (1 - b1^t) u

    with T = warmup_steps. Without an algorithm that averages updates it is that optimizer for one rank. An
    update of Adam lies within that bound where its gradients are sparse, and mostly far below; where v says
    nothing, as of a layer that is first used later, it is what holds the step.

    Args:
        variance_floor: when v is frozen no element is left below this share of its tensor's mean: one bit
            says of every element that it moves.

    Source: 1-bit Adam, arXiv 2102.02888; BAGUA's qadam. Differs from BAGUA: what crosses is the momentum
    divided by its spread, so that what few bits lose is small against every parameter's step, where a
    conv's bias before a batch norm, say, would be flooded with the noise of its neighbours; stage and update
    rule change with the same step, so no gradient is lost; the correction of a frozen v is frozen; betas are
    each group's own; v has a floor.
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
        self.updates: dict[Parameter, Tensor] = {}  # averaged, for the step that comes
        self.is_shared = False  # whether ranks exchange its updates

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
        """One step; `closure` as in torch, unless ranks exchange updates.

        Raises:
            UsageError: a closure, whose gradients would come after the updates were exchanged.
        """
        if closure is not None and self.is_shared:
            raise UsageError(
                "qadam exchanges updates when the step begins, before a closure has made gradients. Call "
                "backward() first, then step() without a closure."
            )
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

    def update(self, parameter: Parameter) -> Tensor:
        """u, with this rank's gradient, or 0 where it has none; m is left as it was."""
        group = self._group_of(parameter)
        beta1, beta2 = group["betas"]
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        moved = self._state_of(parameter)["exp_avg"].mul(beta1).add_(gradient, alpha=1 - beta1)
        most = max(1.0, (1 - beta1) / math.sqrt(1 - beta2))
        return moved.div_(self._spread(parameter)).clamp_(-most, most)

    def _spread(self, parameter: Parameter) -> Tensor:
        """What divides a parameter's momentum, once v is frozen."""
        group = self._group_of(parameter)
        correction = math.sqrt(1 - group["betas"][1] ** self.warmup_steps)
        variance: Tensor = self._state_of(parameter)["exp_avg_sq"]
        return variance.sqrt().div_(correction).add_(group["eps"])

    def _state_of(self, parameter: Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if "exp_avg" not in state:  # it had no gradient while v was learned
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.full_like(parameter, self._group_of(parameter)["eps"] ** 2)
        return state

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
            rate = group["lr"] / (1 - group["betas"][0] ** (group["num_steps"] + 1))
            for parameter in group["params"]:
                update = self.updates.get(parameter)
                if update is None and parameter.grad is not None:
                    update = self.update(parameter)
                if update is not None:
                    parameter.add_(update, alpha=-rate)
                    self._state_of(parameter)["exp_avg"].copy_(update.mul(self._spread(parameter)))
        self.updates = {}


class QAdamMomenta(Centralised):
    """Gradients are averaged in full precision while `QAdam` warms up; afterwards updates are, in few bits.

    Then ranks exchange when the optimizer steps: clipping, a gradient scaler and whatever else a program does
    to `.grad` acts on this rank's gradients, before they are sent. At the end of every backward pass ranks
    tell each other only whether theirs are finite: where one's are not, all get NaN, and every gradient
    scaler skips.

    Args:
        bits: 1, with error feedback at worker and server, or 8, without.
    """

    name = "qadam"
    needs_optimizer = True
    can_spare_inputs = (
        False  # momenta change with the optimizer's step, which a rank without inputs never takes
    )

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
        moved = {id(each) for group in replica.optimizer.param_groups for each in group["params"]}
        left = [
            name
            for name, each in replica.module.named_parameters()
            if each.requires_grad and id(each) not in moved
        ]
        if left:
            # Once the variance is frozen gradients stay a rank's own: another optimizer would part the ranks.
            raise UsageError(
                f"qadam averages what QAdam does, and QAdam does not move {left[0]} (one of {len(left)}). "
                "Give it all trained parameters, or freeze the others with requires_grad_(False)."
            )
        self._optimizer = replica.optimizer
        self._optimizer.is_shared = True

    @property
    def holds_gradients(self) -> bool:
        return self._optimizer.is_frozen

    @property
    def carries_all_values(self) -> bool:
        return True  # while gradients are exchanged they are in full precision

    def exchange(self, talk: Any, values: Tensor, shapes: Any, key: str) -> Any:
        if self._optimizer.is_frozen:
            return super().exchange(talk, values, shapes, key)
        return self._plain.exchange(talk, values, shapes, key)

    def rescale(self, factor: float) -> None:
        """Nothing: what is kept is of updates, which follow from gradients that are no longer scaled."""

    @torch.no_grad()
    def after_gradients(self) -> None:
        if not self._optimizer.is_frozen:
            return
        gradients = [
            parameter.grad
            for bucket in self.replica.gradient_buckets()
            for parameter in bucket.parameters
            if parameter.grad is not None
        ]
        own, answers = all(bool(each.isfinite().all()) for each in gradients), list[bool]()
        self.replica.submit(partial(agreement, own=own, answers=answers), about="finite gradients").wait()
        if not all(answers):
            for each in gradients:
                each.fill_(torch.nan)

    @torch.no_grad()
    def before_step(self) -> None:
        if not self._optimizer.is_frozen:
            return
        buckets = self.replica.gradient_buckets()
        pending = []
        for bucket in buckets:
            bucket.present = [parameter.grad is not None for parameter in bucket.parameters]
            for view, parameter in zip(bucket.views, bucket.parameters, strict=True):
                view.copy_(self._optimizer.update(parameter))
            work = partial(exchange_bucket, algorithm=self, bucket=bucket)
            pending.append(self.replica.submit(work, about=bucket.key))
        for waiting, bucket in zip(pending, buckets, strict=True):
            waiting.wait()
            for view, parameter, is_used in zip(bucket.views, bucket.parameters, bucket.used, strict=True):
                if is_used and parameter.requires_grad:
                    self._optimizer.updates[parameter] = view
