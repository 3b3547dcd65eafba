"""Sequences while they grow: tokens, log-probabilities, and when they are over."""

from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any

from capstan.generation.detokenizer import AnswerText, TokenTexts, texts_of
from capstan.generation.planning.batching import Length
from capstan.generation.requests import Answer, Completion, FinishReason, Request, TokenLogprob
from capstan.generation.runtime.penalties import Penalties, Tally
from capstan.generation.runtime.sampling import Draw

# What lies between the seeds of two answers to one request: odd, so that no two of 2**64 are the same.
_NEXT_ANSWER = 0x632BE59BD9B4E019


@dataclass
class Sequence:
    """One answer in the making: the `answer`-th to request number `request_index`.

    `num_passed` tokens are known not to be the last; another thread may show them.
    """

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
    num_passed: int = 0
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
        request, step = self.request, len(self.generated)
        return Draw(
            request.temperature,
            request.top_k,
            request.top_p,
            seed=self._seed,
            step=step,
            banned=self._ends if step < request.min_tokens else frozenset(),
            min_p=request.min_p,
            bias=request.logit_bias,
            penalties=self._penalties() if request.has_penalties else None,
        )

    def _penalties(self) -> Penalties:
        self._tally.count(self.generated)
        request = self.request
        return Penalties(
            request.repetition_penalty, request.presence_penalty, request.frequency_penalty, self._tally
        )

    @cached_property
    def _tally(self) -> Tally:
        """What has come; the prompt's tokens only where they are penalised."""
        return Tally(self.prompt if self.request.repetition_penalty != 1 else ())

    @cached_property
    def _seed(self) -> int:
        """The request's own, or else made of its id; another for each of its answers."""
        stated = self.request.seed
        if stated is None:
            stated = int.from_bytes(
                blake2b(self.request.id.encode(errors="surrogatepass"), digest_size=8).digest()
            )
        return stated + self.answer * _NEXT_ANSWER

    @cached_property
    def _ends(self) -> frozenset[int]:
        """The tokens that end this answer."""
        own = frozenset(self.request.stop_token_ids)
        return own if self.request.ignore_eos else own | self.stop_tokens

    @cached_property
    def texts(self) -> TokenTexts:
        """What tokens say."""
        return texts_of(self.tokenizer)

    @cached_property
    def _text(self) -> AnswerText:
        """The text so far; kept only while stop texts are looked for."""
        return AnswerText(self.texts, self.prompt)

    def append(self, token: int) -> None:
        """Take the next token; decide whether the sequence is over."""
        self.generated.append(token)
        if token in self._ends or (self.request.stop and self._hits_stop_text(token)):
            self.finish_reason = "stop"
        elif len(self.generated) >= self.request.max_tokens:
            self.finish_reason = "length"
        else:
            self.num_passed = len(self.generated)

    def _hits_stop_text(self, token: int) -> bool:
        """Whether a stop text has appeared; looked for where it can have been completed just now."""
        text, request = self._text, self.request
        before = len(text.shown)
        text.feed(token)
        if len(self.generated) <= request.min_tokens or len(text.shown) == before:
            return False
        found = text.find(request.stop, ends_after=before)
        if found is not None:
            self.cut_text = text.until(found[1] if request.include_stop_str_in_output else found[0])
        return found is not None

    def finished(self) -> Answer:
        """The answer, once `finish_reason` is known."""
        assert self.finish_reason is not None
        return Answer(
            text=self._whole_text() if self.cut_text is None else self.cut_text,
            tokens=tuple(self.generated),
            finish_reason=self.finish_reason,
            logprobs=tuple(self.logprobs) if self.request.logprobs is not None else None,
        )

    def _whole_text(self) -> str:
        """The text of all tokens, without the one that ended it."""
        is_ended = self.generated[-1] in self._ends and not self.request.include_stop_str_in_output
        return self.texts.continuation(self.prompt, self.generated[: -1 if is_ended else None])


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
