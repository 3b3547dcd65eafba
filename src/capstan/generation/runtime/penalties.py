"""Penalties: tokens that have come before become less likely, or likelier.

    x -> x / r if x > 0 else x r                       for tokens of the prompt and of the answer
    x -> x - frequency c - presence                    for tokens of which the answer has c > 0

What has come is kept with each sequence, in host memory. Where logits are, only those of such tokens are
gathered, changed and put back: 25 bytes each, in the room that sorting the logits is given anyway.

Source: OpenAI's definition of the frequency and presence penalties; for the repetition penalty r, CTRL,
section 4.1, arXiv 1909.05858, with the sign rule that transformers and vLLM added to it.
"""

from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# By which a float32 can be multiplied and divided without end; what is beyond makes no difference.
_LEAST_REPETITION, _MOST_REPETITION = 1e-30, 1e30


class Tally:
    """The tokens that have come, each once, and how often each was generated."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._places: dict[int, int] = {}
        self.tokens, self.counts = array("q"), array("f")
        self._num_counted = 0
        for token in prompt:
            self._place(token)

    def _place(self, token: int) -> int:
        place = self._places.setdefault(token, len(self.tokens))
        if place == len(self.tokens):
            self.tokens.append(token)
            self.counts.append(0)
        return place

    def count(self, generated: Sequence[int]) -> None:
        """Count those of an answer's tokens that have not been counted."""
        for token in generated[self._num_counted :]:
            self.counts[self._place(token)] += 1
        self._num_counted = len(generated)


class Penalties(NamedTuple):
    """How much less likely become the tokens of a tally."""

    repetition: float
    presence: float
    frequency: float
    tally: Tally

    @property
    def offsets(self) -> np.ndarray:
        """What is taken from each token's logit."""
        counts = np.array(self.tally.counts)
        return self.presence * (counts > 0) + self.frequency * counts


def penalise(logits: Tensor, penalties: Mapping[int, Penalties]) -> None:
    """Penalise rows of `logits` `[rows, vocabulary]` (float32, contiguous), in place.

    A row that is penalised comes out with 0 for its likeliest token, so that no temperature makes too large a
    number of it.
    """
    rows, width = list(penalties), logits.shape[1]
    places = np.concatenate([row * width + np.array(penalties[row].tally.tokens) for row in rows])
    sizes = [len(each.tally.tokens) for each in penalties.values()]
    factors = [min(max(each.repetition, _LEAST_REPETITION), _MOST_REPETITION) for each in penalties.values()]

    def there(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(logits.device)

    place, flat = there(places), logits.view(-1)
    values = flat[place]
    factor = there(np.repeat(np.array(factors, dtype=np.float32), sizes))
    is_positive = values > 0
    values /= torch.where(is_positive, factor, 1.0)
    values *= torch.where(is_positive, 1.0, factor)
    values -= there(np.concatenate([each.offsets for each in penalties.values()]).astype(np.float32))
    flat[place] = values
    index = torch.tensor(rows, device=logits.device)
    logits[index] -= logits[index].amax(dim=-1, keepdim=True)
