"""What is asked of the engine and what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from capstan.errors import UsageError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how to continue it.

    Args:
        prompt: text, or token ids.
        max_tokens: the most tokens to generate.
        temperature: 0 takes the likeliest token (the default: the same prompt gives the same answer), and so
            does what is too small for a float32 to divide by; above that samples.
        top_k: sample among the k likeliest only; 0 for all.
        top_p: sample among the likeliest tokens that together reach this probability; 1 for all.
        min_p: sample among the tokens that are at least so many times as likely as the likeliest; 0 for all.
        repetition_penalty: divides the logits above 0 of tokens of prompt and answer, multiplies those below;
            1 for none.
        presence_penalty: taken from the logits of tokens that the answer has.
        frequency_penalty: taken from the logits of the answer's tokens as often as each has come.
        logit_bias: what is added to the logits of tokens, from -100 to 100 each.
        seed: with it, a sampled answer is the same in any batch, block or run, and under any id.
            Without it, chance depends on `id`: requests of different ids are drawn apart, and the same
            requests come out the same.
        stop: texts that end the answer; they are not part of it. One may hold special tokens by name.
        stop_token_ids: tokens that end the answer as the model's own end does, `ignore_eos` or not.
        include_stop_str_in_output: the stop text is part of the answer.
        min_tokens: so many tokens come before a stop text counts or an ending token can be drawn.
        n: how many answers.
        logprobs: report the log-probability of each token, and of so many of the likeliest beside it: the
            model's own, before bias, penalties and temperature.
        prompt_logprobs: the same for the prompt's tokens.
        ignore_eos: go on to `max_tokens` whatever the model says.
        id: comes back in the completion.
    """

    prompt: str | Sequence[int]
    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    id: str = ""

    def __post_init__(self) -> None:
        def require(holds: bool, wanted: str, found: object) -> None:
            if not holds:
                raise UsageError(f"A request needs {wanted}, not {found!r}.")

        require(self.max_tokens >= 1, "max_tokens of at least 1", self.max_tokens)
        require(0 <= self.temperature < float("inf"), "a temperature of at least 0", self.temperature)
        require(self.top_k >= 0, "top_k of at least 0", self.top_k)
        require(0 < self.top_p <= 1, "top_p above 0 and at most 1", self.top_p)
        require(0 <= self.min_p <= 1, "min_p from 0 to 1", self.min_p)
        finite = 0 < self.repetition_penalty < float("inf")
        require(finite, "a repetition_penalty above 0", self.repetition_penalty)
        for name in ("presence_penalty", "frequency_penalty"):
            penalty = getattr(self, name)
            require(-2 <= penalty <= 2, f"a {name} from -2 to 2", penalty)
        for token, bias in self.logit_bias.items():
            require(token >= 0, "logit_bias for tokens of at least 0", token)
            require(-100 <= bias <= 100, f"a logit_bias from -100 to 100 for token {token}", bias)
        require(1 <= self.n <= 128, "n from 1 to 128", self.n)
        require(all(self.stop), "stop texts that are not empty", self.stop)
        require(
            all(token >= 0 for token in self.stop_token_ids),
            "stop_token_ids of at least 0",
            self.stop_token_ids,
        )
        fits = 0 <= self.min_tokens <= self.max_tokens
        require(fits, f"min_tokens from 0 to its max_tokens of {self.max_tokens}", self.min_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            require(count is None or 0 <= count <= 100, f"{name} from 0 to 100", count)

    @property
    def has_penalties(self) -> bool:
        """Whether what has come changes what is likely."""
        off = (1.0, 0.0, 0.0)
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != off


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token, its log-probability, and the likeliest tokens at its place with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One continuation of a prompt."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """All answers to one request. The first prompt token has no log-probability."""

    id: str
    prompt_tokens: tuple[int, ...]
    answers: tuple[Answer, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.answers[0].text


@dataclass(frozen=True, kw_only=True)
class Score:
    """The log-probabilities of a text's tokens, each given the ones before it.

    `logprobs[i]` belongs to `tokens[i + 1]`: the first token has nothing before it. `likeliest[i]`, if it
    was asked for, says whether no token was likelier there.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    likeliest: tuple[bool, ...] = ()

    @property
    def total(self) -> float:
        """The log-probability of the text after its first token."""
        return sum(self.logprobs)
