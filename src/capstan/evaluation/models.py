"""The protocol through which evaluation sees a language model, and the values that cross it.

Three verbs: `generate` continues prompts, `score` gives the probability of a continuation after a context,
and `score_rolling` that of every token of a text. All take lists, so that a model which streams its weights
can plan one pass for many requests. Log-probabilities are the model's own, before temperature.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked: a prompt to continue, or, where `echo` is set with `max_tokens` 0, to be scored.

    `continuation` is the end of the prompt whose probability is wanted; empty: that of all of it. `messages`,
    of a role and what it says, stand for the prompt where a server writes the chat template.
    """

    prompt: str
    max_tokens: int = 100
    temperature: float = 0.0
    num_completions: int = 1
    top_k_per_token: int = 1
    stop_sequences: tuple[str, ...] = ()
    echo: bool = False
    continuation: str = ""
    random: str | None = None
    messages: tuple[tuple[str, str], ...] = ()

    @property
    def is_scored(self) -> bool:
        """Whether nothing is generated."""
        return self.echo and self.max_tokens == 0

    def to_dict(self, model: str, deployment: str) -> dict[str, Any]:
        """As it stands in HELM's scenario_state.json."""
        own: dict[str, Any] = {
            "model_deployment": deployment,
            "model": model,
            "embedding": False,
            "prompt": self.prompt,
            "temperature": self.temperature,
            "num_completions": self.num_completions,
            "top_k_per_token": self.top_k_per_token,
            "max_tokens": self.max_tokens,
            "stop_sequences": list(self.stop_sequences),
            "echo_prompt": self.echo,
            "top_p": 1,
            "presence_penalty": 0,
            "frequency_penalty": 0,
        }
        own |= {"continuation": self.continuation} if self.continuation else {}
        if self.messages:
            own["messages"] = [{"role": role, "content": content} for role, content in self.messages]
        return own | ({"random": self.random} if self.random is not None else {})


class Token(NamedTuple):
    """A token's text and its log-probability; 0.0 for a text's first token, which has nothing before it."""

    text: str
    logprob: float


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer: its text, what it is made of, and why it ended ("stop", "length", "endoftext")."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: str = "unknown"

    @property
    def logprob(self) -> float:
        """The log-probability of the whole answer."""
        return sum(token.logprob for token in self.tokens)


@dataclass(frozen=True, kw_only=True)
class Result:
    """All answers to one request, and what they took.

    `seconds` is the request's own time where requests run one by one; in a batch it is the batch's time, and
    `batch_size` says how many shared it.
    """

    completions: tuple[Completion, ...]
    seconds: float = 0.0
    batch_size: int | None = None

    @property
    def seconds_each(self) -> float:
        """This request's share of the time."""
        return self.seconds / (self.batch_size or 1)


class Scored(NamedTuple):
    """A scored text: all its tokens, of which the last `num_scored` are those asked for.

    Tokens before them may have 0.0 where the model did not compute theirs. `is_greedy`: whether each token
    asked for was the likeliest at its place.
    """

    tokens: tuple[Token, ...]
    num_scored: int
    is_greedy: bool = False

    @property
    def logprob(self) -> float:
        """The log-probability of the tokens asked for."""
        return sum(token.logprob for token in self.tokens[len(self.tokens) - self.num_scored :])


class Pair(NamedTuple):
    """A context, and the continuation whose probability after it is wanted."""

    context: str
    continuation: str


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much text a model takes, in tokens.

    `max_request_length` also counts the token that stands before a text (`prefix_token`), so that the text's
    first token is predicted too.
    """

    max_sequence_length: int = 2048
    max_request_length: int = 2048
    prefix_token: str = ""


@runtime_checkable
class LanguageModel(Protocol):
    """A model that can be evaluated. The engine, a transformers model and a server fit it through
    adapters.
    """

    name: str
    limits: Limits

    @property
    def identity(self) -> str:
        """Tells this model from any other that could answer differently: weights, bits, tokenizer."""
        ...

    def encode(self, text: str) -> list[int]:
        """A text's token ids, without special ones."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        ...

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Result]]:
        """Continue prompts; yields each request's index with its result, in any order."""
        ...

    def score(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Scored]]:
        """Score continuations after contexts; yields each pair's index with its score, in any order."""
        ...

    def score_rolling(self, texts: Sequence[str]) -> Iterator[tuple[int, Scored]]:
        """Score every token of texts, each given those before it."""
        ...


def num_tokens_after(encode: Callable[[str], Sequence[int]], context: str, continuation: str) -> int:
    """How many tokens a continuation adds to its context's own; spaces between them count as its own.

    Source: lm-evaluation-harness 0.4, `TemplateLM._encode_pair`. HELM takes as many of the last tokens as the
    continuation has by itself, which differs where a delimiter joins the token before it.
    """
    kept = context.rstrip() or context
    return max(0, len(encode(context + continuation)) - len(encode(kept)))


def in_order(answers: Iterable[tuple[int, Any]], count: int) -> list[Any]:
    """Answers that came in any order, in the order asked."""
    found = dict(answers)
    return [found[index] for index in range(count)]
