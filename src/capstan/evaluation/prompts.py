"""Prompt assembly: blocks in a fixed order, shortened until they fit.

    prompt = global_prefix + instance_prefix.join([instructions, examples ..., question]) + global_suffix

Source: HELM, `adaptation/prompt.py`; instructions stand first only if there are any.
"""

import re
from dataclasses import dataclass, replace
from typing import Protocol

from capstan.evaluation.models import LanguageModel
from capstan.evaluation.specs import AdapterSpec


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt in parts. `truncated_text` replaces it where even without examples it is too long."""

    spec: AdapterSpec
    examples: tuple[str, ...]
    question: str
    truncated_text: str | None = None

    @property
    def text(self) -> str:
        """What the model is shown."""
        if self.truncated_text is not None:
            return self.truncated_text
        spec = self.spec
        blocks = [*([spec.instructions] if spec.instructions else []), *self.examples, self.question]
        text = spec.global_prefix + spec.instance_prefix.join(blocks) + spec.global_suffix
        for pattern, replacement in spec.substitutions:
            text = re.sub(pattern, replacement, text)
        return text

    @property
    def num_examples(self) -> int:
        """How many examples it shows."""
        return len(self.examples)

    @property
    def is_truncated(self) -> bool:
        """Whether its end was cut off."""
        return self.truncated_text is not None


class Room(Protocol):
    """Says what fits a model's context."""

    def fits(self, text: str, num_new: int) -> bool:
        """Whether a prompt and its answer fit."""
        ...

    def cut(self, text: str, num_new: int) -> str:
        """The longest beginning of a prompt that fits."""
        ...


class ModelRoom:
    """The room that a model's limits leave, counted by its own tokenizer."""

    def __init__(self, model: LanguageModel, num_reserved: int = 0) -> None:
        self._model = model
        self._longest = model.limits.max_request_length - num_reserved

    def fits(self, text: str, num_new: int) -> bool:
        """Whether a prompt and its answer fit."""
        longest = self._longest - num_new
        # A token is at least one byte, so most prompts need no tokenizer to be known to fit.
        return len(text.encode(errors="surrogatepass")) <= longest or len(self._model.encode(text)) <= longest

    def cut(self, text: str, num_new: int) -> str:
        """The longest beginning that fits; decoding may join tokens anew, so characters go until it does."""
        keep = max(0, self._longest - num_new)
        cut = self._model.decode(self._model.encode(text)[:keep])
        while cut and not self.fits(cut, num_new):
            cut = cut[:-1]
        return cut


def fitted(prompt: Prompt, room: Room) -> Prompt:
    """The prompt with as many examples as fit, the last ones dropped first; with none, cut at its end."""
    examples = prompt.examples
    while True:
        candidate = replace(prompt, examples=examples)
        if room.fits(candidate.text, prompt.spec.max_tokens):
            return candidate
        if not examples:
            return replace(candidate, truncated_text=room.cut(candidate.text, prompt.spec.max_tokens))
        examples = examples[:-1]
