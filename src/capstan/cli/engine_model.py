"""Where generation and evaluation meet: the engine behind evaluation's protocol."""

import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from capstan.errors import InputError
from capstan.evaluation.chat import templated
from capstan.evaluation.models import Completion, Limits, Pair, Request, Result, Scored, Token
from capstan.evaluation.shared_prefixes import groups_of
from capstan.evaluation.transformers_model import (
    cut_at_stops,
    folder_identity,
    limits_of,
    special_encoded,
)

if TYPE_CHECKING:
    from capstan.generation import Answer, Engine


class EngineModel:
    """A model that may be larger than the memory granted: many requests go through its layers together.

    Prompts that begin alike are one job, in which that beginning is computed once; choices and texts are
    scored in one pass over the weights.
    """

    def __init__(self, engine: "Engine", *, bits: str) -> None:
        if engine.model.tokenizer is None:
            raise InputError(f"{engine.model.folder} has no tokenizer, so its answers cannot be read.")
        self._engine, self._bits = engine, bits
        self._tokenizer = engine.model.tokenizer
        self.name = engine.model.folder.name
        self.limits: Limits = limits_of(engine.model.meta_model.config, self._tokenizer)
        self._text = lru_cache(maxsize=200_000)(self._token_text)

    @property
    def identity(self) -> str:
        """The folder's digest, the bits, and what it computes in."""
        dtype = self._engine.model.meta_model.compute_dtype
        return f"engine/{folder_identity(self._engine.model.folder)}/{self._bits}/{dtype}"

    def encode(self, text: str) -> list[int]:
        """A text's token ids, without special ones."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def _whole(self, text: str) -> list[int]:
        return special_encoded(self._tokenizer, text, self.limits.prefix_token)

    def chat_text(self, messages: Sequence[dict[str, str]], *, continues: bool = False) -> str:
        """Messages by the tokenizer's chat template."""
        return templated(self._tokenizer, messages, continues=continues)

    def _token_text(self, token: int) -> str:
        return self.decode([token])

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Result]]:
        """Continue prompts, those that begin alike in one job."""
        from capstan.generation import Request as Asked

        prompts = [self._whole(request.prompt) for request in requests]
        for group in _jobs(prompts):
            asked = [
                Asked(
                    prompt=prompts[at],
                    max_tokens=requests[at].max_tokens,
                    temperature=requests[at].temperature,
                    stop=requests[at].stop_sequences,
                    n=requests[at].num_completions,
                    seed=int(requests[at].random or 0),
                    logprobs=0,
                    id=str(at),
                )
                for at in group
            ]
            start_s = time.perf_counter()
            for done in self._engine.generate(asked):
                index = int(done.id)
                completions = tuple(self._completion(each, requests[index]) for each in done.answers)
                seconds = time.perf_counter() - start_s
                yield index, Result(completions=completions, seconds=seconds, batch_size=len(group))

    def _completion(self, answer: "Answer", request: Request) -> Completion:
        logprobs = [each.logprob for each in answer.logprobs or ()]
        kept = zip(answer.tokens, logprobs, strict=False)
        tokens = [Token(self._text(token), logprob) for token, logprob in kept]
        stopped = cut_at_stops(answer.text, tokens, request.stop_sequences, answer.finish_reason)
        if stopped.finish_reason != "stop":
            return stopped
        # The engine leaves the stop text out already; the tokens that spell it go here.
        return _without_rest(stopped)

    def score(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Scored]]:
        """Score continuations in one pass over the weights."""
        prompts = [self._whole(pair.context + pair.continuation) for pair in pairs]
        for index, scored in self._scored(prompts):
            pair = pairs[index]
            own = len(self.encode(pair.context + pair.continuation))
            count = min(len(self.encode(pair.continuation)), len(scored.tokens) - 1)
            yield index, Scored(scored.tokens[len(scored.tokens) - own :], count)

    def score_rolling(self, texts: Sequence[str]) -> Iterator[tuple[int, Scored]]:
        """Score every token of texts in one pass over the weights."""
        yield from self._scored([self.encode(text) for text in texts])

    def _scored(self, prompts: Sequence[list[int]]) -> Iterator[tuple[int, Scored]]:
        if not prompts:
            return
        long = [at for at, prompt in enumerate(prompts) if len(prompt) > 1]
        found = dict(zip(long, self._engine.score([prompts[at] for at in long]), strict=True)) if long else {}
        for at, prompt in enumerate(prompts):
            logprobs = [0.0, *found[at].logprobs] if at in found else [0.0] * len(prompt)
            tokens = tuple(Token(self._text(t), v) for t, v in zip(prompt, logprobs, strict=True))
            yield at, Scored(tokens, max(0, len(tokens) - 1))


def _without_rest(completion: Completion) -> Completion:
    kept: list[Token] = []
    length = 0
    for token in completion.tokens:
        if length >= len(completion.text):
            break
        kept.append(token)
        length += len(token.text)
    return Completion(text=completion.text, tokens=tuple(kept), finish_reason=completion.finish_reason)


def _jobs(prompts: Sequence[list[int]]) -> list[tuple[int, ...]]:
    """Jobs of prompts that begin alike; all that share nothing are one more."""
    groups = groups_of(prompts, [max(0, len(prompt) - 1) for prompt in prompts])
    loose = tuple(at for group in groups if not group.prefix for at in group.indices)
    return [group.indices for group in groups if group.prefix] + ([loose] if loose else [])
