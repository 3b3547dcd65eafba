"""A model whose answers follow from its prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import toy_data
from capstan.evaluation import Completion, Limits, Pair, Request, RequestState, Result, Scored, Token


class ToyModel:
    """A model of made-up words: a token is a word with the space before it."""

    def __init__(self, longest: int = 400, candidates: Sequence[str] = ("Yes", "No", "A")) -> None:
        self.name = "toy"
        self.limits = Limits(max_sequence_length=longest - 1, max_request_length=longest, prefix_token="<s>")
        self.num_asked = 0
        self._candidates = candidates
        self._ids: dict[str, int] = {}
        self._texts: list[str] = []

    @property
    def identity(self) -> str:
        return "toy/1"

    def encode(self, text: str) -> list[int]:
        return [self._id(token) for token in toy_data.tokens_of(text)]

    def _id(self, token: str) -> int:
        if token not in self._ids:
            self._ids[token] = len(self._texts)
            self._texts.append(token)
        return self._ids[token]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self._texts[token] for token in tokens)

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Result]]:
        for index, request in enumerate(requests):
            self.num_asked += 1
            yield index, told_result(request, self._candidates)

    def score(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Scored]]:
        for index, pair in enumerate(pairs):
            self.num_asked += 1
            tokens = tuple(Token(*each) for each in toy_data.told_tokens(pair.context + pair.continuation))
            yield index, Scored(tokens, min(len(tokens), len(self.encode(pair.continuation))))

    def score_rolling(self, texts: Sequence[str]) -> Iterator[tuple[int, Scored]]:
        for index, text in enumerate(texts):
            self.num_asked += 1
            tokens = tuple(Token(*each) for each in toy_data.told_tokens(text))
            yield index, Scored(tokens, max(0, len(tokens) - 1))


def told_result(request: Request, candidates: Sequence[str]) -> Result:
    """What the made-up model says."""
    if request.is_scored:
        tokens = tuple(Token(*each) for each in toy_data.told_tokens(request.prompt))
        return Result(
            completions=(Completion(text=request.prompt, tokens=tokens, finish_reason="length"),), seconds=0.5
        )
    return Result(
        completions=tuple(
            Completion(text=text, tokens=tuple(Token(*part) for part in parts), finish_reason=reason)
            for text, parts, reason in toy_data.told_answers(
                request.prompt, request.num_completions, candidates
            )
        ),
        seconds=0.5,
    )


def told(state: RequestState) -> RequestState:
    """A request answered as it was when the golden values were made: from the instance's own references."""
    candidates = [reference.text for reference in state.instance.references]
    if state.output_mapping is not None:
        candidates = list(state.output_mapping)
    if state.reference_index is not None:
        candidates = ["Yes", "No"]
    return replace(state, result=told_result(state.request, candidates))
