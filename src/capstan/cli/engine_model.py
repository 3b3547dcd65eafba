"""Where generation and evaluation meet: the engine behind evaluation's protocol."""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from capstan.errors import InputError
from capstan.evaluation.chat import templated
from capstan.evaluation.models import Completion, Limits, Pair, Request, Result, Scored, Token
from capstan.evaluation.shared_prefixes import groups_of
from capstan.evaluation.token_texts import (
    GrowingText,
    Pieces,
    after_special,
    cut_at_stops,
    pieces_of,
    tokens_within,
)
from capstan.evaluation.transformers_model import (
    folder_identity,
    limits_of,
    num_wanted,
    special_encoded,
    wants_special,
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
                completions = tuple(
                    self._completion(each, prompts[index], requests[index]) for each in done.answers
                )
                seconds = time.perf_counter() - start_s
                yield index, Result(completions=completions, seconds=seconds, batch_size=len(group))

    def _completion(self, answer: "Answer", prompt: Sequence[int], request: Request) -> Completion:
        growing = GrowingText(self.decode, after_special(prompt, self._tokenizer.all_special_ids))
        for token in answer.tokens:
            growing.add(token)
        logprobs = [each.logprob for each in answer.logprobs or ()]
        tokens = list(map(Token, growing.finished(), logprobs))
        if answer.finish_reason == "stop":
            # The engine leaves the stop text out already; the tokens that spell it go here.
            tokens = list(tokens_within(answer.text, tokens))
        return cut_at_stops(answer.text, tokens, request.stop_sequences, answer.finish_reason)

    def score(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Scored]]:
        """Score continuations in one pass over the weights."""
        wholes = [pair.context + pair.continuation for pair in pairs]
        prefix = self.limits.prefix_token
        prompts = [
            pieces_of(self._tokenizer, text, adds_special=wants_special(text, prefix)) for text in wholes
        ]
        for index, scored in self._scored(prompts):
            own = len(self.encode(wholes[index]))
            count = num_wanted(prompts[index], self.encode, pairs[index])
            yield index, Scored(scored.tokens[len(scored.tokens) - own :], count)

    def score_rolling(self, texts: Sequence[str]) -> Iterator[tuple[int, Scored]]:
        """Score every token of texts in one pass over the weights."""
        yield from self._scored([pieces_of(self._tokenizer, text, adds_special=False) for text in texts])

    def _scored(self, prompts: Sequence[Pieces]) -> Iterator[tuple[int, Scored]]:
        if not prompts:
            return
        long = [at for at, prompt in enumerate(prompts) if len(prompt.ids) > 1]
        asked = [prompts[at].ids for at in long]
        found = dict(zip(long, self._engine.score(asked), strict=True)) if long else {}
        for at, prompt in enumerate(prompts):
            logprobs = [0.0, *found[at].logprobs] if at in found else [0.0] * len(prompt.ids)
            yield at, Scored(tuple(map(Token, prompt.texts, logprobs)), max(0, len(prompt.ids) - 1))


def _jobs(prompts: Sequence[list[int]]) -> list[tuple[int, ...]]:
    """Jobs of prompts that begin alike; all that share nothing are one more."""
    groups = groups_of(prompts, [max(0, len(prompt) - 1) for prompt in prompts])
    loose = tuple(at for group in groups if not group.prefix for at in group.indices)
    return [group.indices for group in groups if group.prefix] + ([loose] if loose else [])
