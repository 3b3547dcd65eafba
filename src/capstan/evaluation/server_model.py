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
from pathlib import Path
from typing import Any, TypeVar

from capstan.errors import DeviceError, InputError, TimeoutExpired
from capstan.evaluation.models import Completion, Limits, Pair, Request, Result, Scored, Token

_TIMEOUT_S, _TRIES, _CONCURRENT = 600.0, 3, 16
Asked = TypeVar("Asked")
Found = TypeVar("Found")


class ServerModel:
    """The model `name` at `url`, such as "http://127.0.0.1:8000/v1".

    Args:
        tokenizer: a folder with the model's tokenizer; without it the server is asked to count.
        token: sent as a bearer token.
        max_length: the context in tokens, where the server does not say.
    """

    def __init__(
        self,
        url: str,
        name: str,
        *,
        tokenizer: Path | None = None,
        token: str | None = None,
        max_length: int = 2048,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        self.name = name
        self._url = url.rstrip("/")
        self._token, self._timeout_s = token, timeout_s
        self._tokenizer: Any = None
        if tokenizer is not None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        self.limits = Limits(max_sequence_length=max_length, max_request_length=max_length)

    @property
    def identity(self) -> str:
        """The address and name: what a server serves under a name may change, so keep its answers apart."""
        return f"server/{self._url}/{self.name}"

    def encode(self, text: str) -> list[int]:
        """A text's token ids."""
        if self._tokenizer is not None:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        root = self._url.removesuffix("/v1")
        asked = {"model": self.name, "prompt": text, "add_special_tokens": False}
        return list(self._post(f"{root}/tokenize", asked)["tokens"])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        if self._tokenizer is not None:
            return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))
        root = self._url.removesuffix("/v1")
        asked = {"model": self.name, "tokens": list(tokens)}
        return str(self._post(f"{root}/detokenize", asked)["prompt"])

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
        return Scored(tokens, min(len(self.encode(pair.continuation)), len(tokens)))

    def _echoed(self, text: str) -> tuple[Token, ...]:
        asked = {"prompt": text, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0.0}
        choice = self._completions(asked)["choices"][0]
        tokens = _tokens(choice)
        if not tokens:
            raise InputError(
                f"{self._url} gave no log-probabilities of the prompt. It must know echo and logprobs in "
                "/v1/completions to score choices and texts."
            )
        return tokens[:-1]  # the last one is new: servers want at least one

    def _generated(self, request: Request) -> Result:
        asked = {
            "prompt": request.prompt,
            "max_tokens": max(1, request.max_tokens),
            "temperature": request.temperature,
            "n": request.num_completions,
            "logprobs": 0,
        }
        if request.stop_sequences:
            asked["stop"] = list(request.stop_sequences)
        if request.random is not None:
            asked["seed"] = int(request.random)
        start_s = time.perf_counter()
        answer = self._completions(asked)
        completions = tuple(
            Completion(
                text=choice["text"],
                tokens=_tokens(choice),
                finish_reason=choice.get("finish_reason") or "unknown",
            )
            for choice in answer["choices"]
        )
        return Result(completions=completions, seconds=time.perf_counter() - start_s)

    def _completions(self, asked: dict[str, Any]) -> dict[str, Any]:
        return self._post(f"{self._url}/completions", {"model": self.name} | asked)

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

    def _post(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        for attempt in range(1, _TRIES + 1):
            try:
                with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                    return dict(json.loads(answer.read()))
            except urllib.error.HTTPError as error:
                if error.code not in (429, 502, 503) or attempt == _TRIES:
                    words = error.read(500).decode(errors="replace")
                    raise InputError(f"{url} answered {error.code}: {words}") from error
            except TimeoutError as error:
                raise TimeoutExpired(f"{url} did not answer within {self._timeout_s:.0f} s.") from error
            except (urllib.error.URLError, ConnectionError, ValueError) as error:
                if attempt == _TRIES:
                    raise DeviceError(f"{url} cannot be asked: {error}. Is the server running?") from error
            time.sleep(0.5 * attempt)
        raise AssertionError("every try returns or raises")


def _tokens(choice: dict[str, Any]) -> tuple[Token, ...]:
    found = choice.get("logprobs") or {}
    texts, values = found.get("tokens") or [], found.get("token_logprobs") or []
    return tuple(Token(text, value or 0.0) for text, value in zip(texts, values, strict=False))
