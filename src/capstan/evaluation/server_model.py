"""A model behind an OpenAI-compatible server: completions with log-probabilities, echoed for scoring.

Works with `capstan serve`, vLLM and others whose `/v1/completions` knows `echo` and `logprobs`. Token
counts come from the server's `/tokenize` or from a local tokenizer folder.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from capstan.errors import DeviceError, InputError, TimeoutExpired
from capstan.evaluation.chat import templated
from capstan.evaluation.models import (
    Completion,
    Limits,
    Pair,
    Request,
    Result,
    Scored,
    Token,
    num_tokens_after,
)
from capstan.evaluation.token_texts import cut_at_ends, num_covering, pieces_of, tokens_within
from capstan.evaluation.tokenizer_only import read_tokenizer

_TIMEOUT_S, _TRIES, _CONCURRENT = 600.0, 3, 16
_ASSUMED_LENGTH = 2048
_NO_ROUTE = (404, 405, 501)
Asked = TypeVar("Asked")
Found = TypeVar("Found")


class ServerModel:
    """The model `name` at `url`, such as "http://127.0.0.1:8000/v1".

    The context is what `/v1/models` says (`max_model_len`), less the token that a server makes beside a text
    that it scores and those that it puts around a prompt.

    Args:
        tokenizer: a folder with the model's tokenizer; without it the server is asked to count.
        token: sent as a bearer token.
        max_length: the context in tokens, where the server does not say or less is wanted.

    Raises:
        DeviceError: the server cannot be asked.
        InputError: it refuses, or the tokenizer cannot be loaded.
    """

    has_chat_route = True

    def __init__(
        self,
        url: str,
        name: str,
        *,
        tokenizer: Path | None = None,
        token: str | None = None,
        max_length: int | None = None,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        self.name = name
        self._url = url.rstrip("/")
        self._token, self._timeout_s = token, timeout_s
        self._tokenizer: Any = None if tokenizer is None else read_tokenizer(tokenizer)
        told = self._told_length()
        known = [each for each in (told, max_length) if each is not None]
        length = min(known, default=_ASSUMED_LENGTH)
        self.notes = () if known else (
            f"the server does not say its context: {length:,} tokens were assumed (--max-length)",
        )  # fmt: skip
        longest = length - 1 - self._num_special()
        if longest < 1:
            raise InputError(
                f"A context of {length:,} tokens leaves no room for a prompt. Give --max-length."
            )
        self.limits = Limits(max_sequence_length=longest, max_request_length=longest)

    def _told_length(self) -> int | None:
        """The context that the server states for the model, if it does."""
        try:
            cards = self._ask(f"{self._url}/models").get("data") or []
        except InputError as error:
            if getattr(error.__cause__, "code", None) in _NO_ROUTE:
                return None
            raise
        card = next((each for each in cards if isinstance(each, dict) and each.get("id") == self.name), {})
        told = card.get("max_model_len") or card.get("context_length")
        return told if isinstance(told, int) and told > 0 else None

    def _num_special(self) -> int:
        """How many tokens the server puts around a prompt."""
        if self._tokenizer is not None:
            return int(self._tokenizer.num_special_tokens_to_add())
        return len(self._tokens_of("x", adds_special=True)) - len(self._tokens_of("x", adds_special=False))

    @property
    def identity(self) -> str:
        """The address and name: what a server serves under a name may change, so keep its answers apart."""
        return f"server/{self._url}/{self.name}"

    def encode(self, text: str) -> list[int]:
        """A text's token ids."""
        if self._tokenizer is not None:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._tokens_of(text, adds_special=False)

    def _tokens_of(self, text: str, *, adds_special: bool) -> list[int]:
        asked = {"model": self.name, "prompt": text, "add_special_tokens": adds_special}
        return list(self._ask(f"{self._url.removesuffix('/v1')}/tokenize", asked)["tokens"])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        if self._tokenizer is not None:
            return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))
        asked = {"model": self.name, "tokens": list(tokens)}
        return str(self._ask(f"{self._url.removesuffix('/v1')}/detokenize", asked)["prompt"])

    def chat_text(self, messages: Sequence[dict[str, str]], *, continues: bool = False) -> str:
        """Messages by the chat template of the tokenizer's folder."""
        if self._tokenizer is None:
            raise InputError(
                "A server's chat template is read from its tokenizer's folder: give --tokenizer."
            )
        return templated(self._tokenizer, messages, continues=continues)

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Result]]:
        """Continue prompts, several at a time."""
        yield from self._together(requests, self._generated)

    def score(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Scored]]:
        """Score continuations: the prompt is echoed with the log-probabilities of its tokens."""
        yield from self._together(pairs, self._pair_scored)

    def score_rolling(self, texts: Sequence[str]) -> Iterator[tuple[int, Scored]]:
        """Score every token of texts."""

        def scored(text: str) -> Scored:
            tokens = self._echoed(text)
            return Scored(tokens, max(0, len(tokens) - 1))

        yield from self._together(texts, scored)

    def _pair_scored(self, pair: Pair) -> Scored:
        tokens = self._echoed(pair.context + pair.continuation)
        count = max(
            num_covering([token.text for token in tokens], pair.continuation),
            num_tokens_after(self.encode, *pair),
        )
        return Scored(tokens, min(count, len(tokens)))

    def _echoed(self, text: str) -> tuple[Token, ...]:
        asked = {
            "prompt": self._prompt(text),
            "max_tokens": 1,
            "echo": True,
            "logprobs": 1,
            "temperature": 0.0,
        }
        choice = self._completions(asked)["choices"][0]
        told = choice.get("logprobs") or {}
        values = (told.get("token_logprobs") or [])[:-1]  # the last one is new: servers want at least one
        if not values:
            raise InputError(
                f"{self._url} gave no log-probabilities of the prompt. It must know echo and logprobs in "
                "/v1/completions to score choices and texts."
            )
        texts = self._said(text, choice, len(values))
        # What the server puts before a text says nothing and has no probability.
        first = next((at for at, each in enumerate(texts) if each or values[at] is not None), 0)
        return tuple(
            Token(each, value or 0.0) for each, value in zip(texts[first:], values[first:], strict=True)
        )

    def _said(self, text: str, choice: dict[str, Any], count: int) -> list[str]:
        """What the tokens of an echoed text say: by the tokenizer at hand, else as the server shows them."""
        if self._tokenizer is not None:
            pieces = pieces_of(self._tokenizer, text, adds_special=not self._begins(text))
            if len(pieces.ids) == count:
                return pieces.texts
        return _cut(text, choice["logprobs"], count)

    def _begins(self, text: str) -> bool:
        """Whether a text has the model's beginning already, which the server would add again."""
        begins = getattr(self._tokenizer, "bos_token", None)
        return bool(begins) and text.startswith(str(begins))

    def _prompt(self, text: str) -> str | list[int]:
        return self.encode(text) if self._begins(text) else text

    def _generated(self, request: Request) -> Result:
        asked: dict[str, Any] = {
            "max_tokens": max(1, request.max_tokens),
            "temperature": request.temperature,
            "n": request.num_completions,
        }
        if request.stop_sequences:
            asked["stop"] = list(request.stop_sequences)
        if request.random is not None:
            asked["seed"] = int(request.random)
        start_s = time.perf_counter()
        if request.messages:
            messages = [{"role": role, "content": content} for role, content in request.messages]
            asked |= {"model": self.name, "messages": messages, "logprobs": True}
            choices = self._ask(f"{self._url}/chat/completions", asked)["choices"]
            completions = tuple(map(_chat_completion, choices))
        else:
            choices = self._completions(asked | {"prompt": self._prompt(request.prompt), "logprobs": 0})[
                "choices"
            ]
            completions = tuple(map(_completion, choices))
        return Result(completions=completions, seconds=time.perf_counter() - start_s)

    def _completions(self, asked: dict[str, Any]) -> dict[str, Any]:
        return self._ask(f"{self._url}/completions", {"model": self.name} | asked)

    def _together(self, items: Sequence[Asked], ask: Callable[[Asked], Found]) -> Iterator[tuple[int, Found]]:
        if not items:
            return
        with ThreadPoolExecutor(min(_CONCURRENT, len(items))) as pool:
            futures = [pool.submit(ask, item) for item in items]
            try:
                for index, future in enumerate(futures):
                    yield index, future.result()
            finally:
                for future in futures:
                    future.cancel()

    def _ask(self, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """What the server answers to a body, or, without one, to a question."""
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
        for attempt in range(1, _TRIES + 1):
            try:
                with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                    return dict(json.loads(answer.read()))
            except urllib.error.HTTPError as error:
                if error.code not in (429, 502, 503) or attempt == _TRIES:
                    words = error.read(500).decode(errors="replace")
                    hint = " Give its token: --api-key, or CAPSTAN_TOKEN." if error.code in (401, 403) else ""
                    raise InputError(f"{url} answered {error.code}: {words}{hint}") from error
            except TimeoutError as error:
                raise TimeoutExpired(f"{url} did not answer within {self._timeout_s:.0f} s.") from error
            except (urllib.error.URLError, ConnectionError, ValueError) as error:
                if attempt == _TRIES:
                    raise DeviceError(f"{url} cannot be asked: {error}. Is the server running?") from error
            time.sleep(0.5 * attempt)
        raise AssertionError("every try returns or raises")


def _completion(choice: dict[str, Any]) -> Completion:
    text, told = str(choice["text"]), choice.get("logprobs") or {}
    values = told.get("token_logprobs") or []
    tokens = tuple(Token(*each) for each in zip(_cut(text, told, len(values)), values, strict=True))
    return _told_completion(text, tokens, choice)


def _chat_completion(choice: dict[str, Any]) -> Completion:
    text = str(choice["message"].get("content") or "")
    entries = (choice.get("logprobs") or {}).get("content") or []
    told = {"tokens": [each["token"] for each in entries]}
    texts = _cut(text, told, len(entries))
    tokens = tuple(Token(said, each["logprob"]) for said, each in zip(texts, entries, strict=True))
    return _told_completion(text, tokens, choice)


def _told_completion(text: str, tokens: Sequence[Token], choice: dict[str, Any]) -> Completion:
    reason = choice.get("finish_reason") or "unknown"
    # Tokens that spell a stop text lie behind the text.
    tokens = tokens_within(text, tokens) if reason == "stop" else tuple(tokens)
    return Completion(text=text, tokens=tokens, finish_reason=reason)


def _cut(text: str, told: dict[str, Any], count: int) -> list[str]:
    """A text as its tokens say it, by the places that a server states, else by how long its tokens are.

    Servers show part of a character as U+FFFD or as bytes, and some leave out the space of a first word: the
    text itself is what they say together.
    """
    starts = (told.get("text_offset") or [])[: count + 1]
    if len(starts) >= count and all(isinstance(start, int) for start in starts):
        ends = [start - starts[0] for start in starts[1 : count + 1]]
        return cut_at_ends(text, [*ends, len(text)][:count])
    return cut_at_ends(text, accumulate(len(token) for token in (told.get("tokens") or [])[:count]))
