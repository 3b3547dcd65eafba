"""The steps of a job: weights, cache and activations move, layers compute, tokens are drawn."""

from capstan.generation.runtime.measured import OnProgress, Progress
from capstan.generation.runtime.sequences import Sequence

__all__ = ["OnProgress", "Progress", "Sequence"]
