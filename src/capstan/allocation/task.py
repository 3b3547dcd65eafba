"""What is trained, and how many bytes each tasklet of it sends: the numbers that enter the cost."""

import math
from dataclasses import dataclass

from capstan.errors import UsageError, unknown_name

_GRADIENT_BYTES = 4
_ACTIVATION_BYTES = 2
# Weight, gradient and Adam's two moments, 4 bytes each. Activations come on top, so this is a lower bound
# and a device that is refused for it is refused rightly.
STATE_BYTES_PER_PARAMETER = 16
_PAPER_HIDDEN_SIZE = 2024


@dataclass(frozen=True, kw_only=True)
class Tasklet:
    """The bytes of one tasklet, which is one stage of one replica.

    `gradient_bytes` are the gradients of the stage; `activation_bytes` is what crosses one boundary forward
    for the replica's share of the batch, and the same again backward.
    """

    gradient_bytes: float
    activation_bytes: float

    def __post_init__(self) -> None:
        for name in ("gradient_bytes", "activation_bytes"):
            _require_positive(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """A transformer and its batch; by default the paper's GPT3-1.3B with a million tokens a step.

    The paper's cost reads neither layers nor the tokens of a sample; a simulated step does.
    """

    parameters: float = 1.3e9
    hidden_size: float = 2048.0
    batch_tokens: float = 1e6
    num_layers: int = 24
    sequence_tokens: float = 2048.0

    def __post_init__(self) -> None:
        for name in ("parameters", "hidden_size", "batch_tokens", "num_layers", "sequence_tokens"):
            _require_positive(name, getattr(self, name))

    def tasklet(self, *, stages: int, replicas: int, cost_model: str = "corrected") -> Tasklet:
        """What one of stages × replicas tasklets sends.

            gradient_bytes = 4 parameters / stages
            activation_bytes = 2 batch_tokens hidden_size / replicas

        Args:
            cost_model: `corrected`, or `paper` for the constants of the published program, which wrote a
                hidden size of 2024 for 2048 and counted activations in GiB where all else is decimal.
                They belong to the paper's own task, so another one is refused.

        Raises:
            UsageError: an unknown cost model, or `paper` with another task.

        Source: DT-FM, arXiv 2206.01288, and the constants of its published scheduler.
        """
        if cost_model not in COST_MODELS:
            raise unknown_name("cost model", cost_model, COST_MODELS)
        gradient_bytes = _GRADIENT_BYTES * self.parameters / stages
        if cost_model == "paper":
            if self != TrainingTask():
                raise UsageError(
                    f"The cost model 'paper' has constants for {TrainingTask()} only, but the task "
                    f"is {self}. Use the cost model 'corrected' for other tasks."
                )
            gib = _ACTIVATION_BYTES * self.batch_tokens * _PAPER_HIDDEN_SIZE / replicas / 2**30
            return Tasklet(gradient_bytes=gradient_bytes, activation_bytes=gib * 1e9)
        return Tasklet(
            gradient_bytes=gradient_bytes,
            activation_bytes=_ACTIVATION_BYTES * self.batch_tokens * self.hidden_size / replicas,
        )

    def state_bytes(self, *, stages: int) -> int:
        """Memory that a stage needs at least: weights, gradients and Adam's moments in 4 bytes each."""
        return math.ceil(STATE_BYTES_PER_PARAMETER * self.parameters / stages)


COST_MODELS = ("corrected", "paper")


def _require_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{name} is {value}; give a finite number above 0.")
