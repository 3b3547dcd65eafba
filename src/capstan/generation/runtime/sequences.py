"""Sequences while they grow: tokens, log-probabilities, and when they are over."""

from dataclasses import dataclass, field
from typing import Any

from capstan.generation.planning.batching import Length
from capstan.generation.requests import Answer, Completion, FinishReason, Request, TokenLogprob
from capstan.generation.runtime.sampling import Draw

# A token has at least a byte. So many more than a stop text has bytes are looked at, for those that add none.
_SPLIT_CHARACTERS = 16


@dataclass
class Sequence:
    """One answer in the making: the `answer`-th to request number `request_index`."""

    request: Request
    request_index: int
    answer: int
    prompt: list[int]
    stop_tokens: frozenset[int]
    tokenizer: Any
    generated: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cut_text: str | None = None
    is_wanted: bool = True  # False, by any thread: nobody waits for it any more

    @property
    def length(self) -> Length:
        """What is left: all tokens so far count as given, so an interrupted sequence goes on."""
        return Length(len(self.prompt) + len(self.generated), self.request.max_tokens - len(self.generated))

    def token(self, position: int) -> int:
        """The token at `position`, of the prompt or generated."""
        before = len(self.prompt)
        return self.prompt[position] if position < before else self.generated[position - before]

    @property
    def draw(self) -> Draw:
        """How the next token is chosen."""
        request = self.request
        return Draw(
            request.temperature,
            request.top_k,
            request.top_p,
            seed=request.seed + self.answer * 0x632BE59BD9B4E019,
            step=len(self.generated),
        )

    def append(self, token: int) -> None:
        """Take the next token; decide whether the sequence is over."""
        self.generated.append(token)
        if (token in self.stop_tokens and not self.request.ignore_eos) or (
            self.request.stop and self._hits_stop_text()
        ):
            self.finish_reason = "stop"
        elif len(self.generated) >= self.request.max_tokens:
            self.finish_reason = "length"

    def _hits_stop_text(self) -> bool:
        """Whether a stop text has appeared; looked for where it can have been completed just now."""
        longest = max(len(stop.encode(errors="surrogatepass")) for stop in self.request.stop)
        tail = self._decode(self.generated[-(longest + _SPLIT_CHARACTERS) :])
        if not any(stop in tail for stop in self.request.stop):
            return False
        text = self._decode(self.generated)
        places = [place for stop in self.request.stop if (place := text.find(stop)) >= 0]
        if places:
            self.cut_text = text[: min(places)]
        return bool(places)

    def _decode(self, tokens: list[int]) -> str:
        if self.tokenizer is None:
            return ""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def finished(self) -> Answer:
        """The answer, once `finish_reason` is known."""
        assert self.finish_reason is not None
        return Answer(
            text=self._decode(self.generated) if self.cut_text is None else self.cut_text,
            tokens=tuple(self.generated),
            finish_reason=self.finish_reason,
            logprobs=tuple(self.logprobs) if self.request.logprobs is not None else None,
        )


def completion_of(answers: list[Sequence]) -> Completion:
    """What the sequences of one request, all over, come to."""
    first = answers[0]
    scored: tuple[TokenLogprob | None, ...] | None = None
    if first.request.prompt_logprobs is not None:
        scored = (None, *first.prompt_logprobs)
    finished: list[Answer] = [growing.finished() for growing in answers]
    return Completion(
        id=first.request.id,
        prompt_tokens=tuple(first.prompt),
        answers=tuple(finished),
        prompt_logprobs=scored,
    )
