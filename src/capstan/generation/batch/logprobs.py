"""Log-probabilities of tokens in OpenAI's two forms: parallel lists for completions, entries for chats.

Source: OpenAI's completion and chat completion objects; part of a character is written as OpenAI does, by its
bytes; a token whose text another one at its place has already is written `token_id:N`, as vLLM does.
Differs: a special token is listed by its name, and adds no bytes, since no text shows it.
"""

from collections.abc import Sequence
from math import isnan
from typing import Any

from capstan.generation.detokenizer import UNFINISHED, Detokenizer, texts_of
from capstan.generation.requests import TokenLogprob

Json = dict[str, Any]


class LogprobWriter:
    """Writes the log-probabilities of tokens that follow one another, some at a time.

    Args:
        tokenizer: what turns tokens into text; None for none.
        before: the tokens before the first one.
        offset: where the text of the first one begins in what is shown.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int], *, offset: int = 0) -> None:
        self._texts = texts_of(tokenizer)
        self._detokenizer = Detokenizer(self._texts, before)
        self._offset = offset

    def completion(self, entries: Sequence[TokenLogprob]) -> Json:
        """Lists of equal length; an echoed prompt's first token has no log-probability."""
        tokens, tops, offsets = [], [], []
        for entry in entries:
            tokens.append(self._name(entry.token))
            tops.append(self._named(entry) or None)
            offsets.append(self._offset)
            self._pass(entry.token)
        return {
            "tokens": tokens,
            "token_logprobs": [None if isnan(entry.logprob) else entry.logprob for entry in entries],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def chat(self, entries: Sequence[TokenLogprob]) -> Json:
        """A list with an entry for each token."""
        content = []
        for entry in entries:
            tops = [self._entry(token, value) for token, value in entry.top]
            content.append(self._entry(entry.token, entry.logprob) | {"top_logprobs": tops})
            self._pass(entry.token)
        return {"content": content}

    def prompt(self, entries: Sequence[TokenLogprob | None], tokens: Sequence[int]) -> list[Json | None]:
        """vLLM's list of a prompt's tokens: an object by token ids for each but the first."""
        listed: list[Json | None] = []
        for token, entry in zip(tokens, entries, strict=True):
            values = {} if entry is None else dict(entry.top) | {entry.token: entry.logprob}
            each = {
                str(one): {"logprob": value, "decoded_token": self._said(one)}
                for one, value in values.items()
            }
            listed.append(None if entry is None else each)
            self._pass(token)
        return listed

    def _pass(self, token: int) -> None:
        self._offset += len(self._detokenizer.feed(token))

    def _said(self, token: int) -> str:
        return self._texts.text(token, is_first=self._detokenizer.is_first)

    def _bytes(self, token: int) -> bytes:
        return self._texts.bytes_of(token, is_first=self._detokenizer.is_first)

    def _name(self, token: int) -> str:
        return f"bytes:{written}" if (written := self._escaped(token)) else self._said(token)

    def _escaped(self, token: int) -> str:
        """The bytes of a token that is part of a character; nothing for others."""
        if UNFINISHED not in self._said(token):
            return ""
        return "".join(f"\\x{value:02x}" for value in self._bytes(token))

    def _named(self, entry: TokenLogprob) -> dict[str, float]:
        named: dict[str, float] = {}
        for token, value in entry.top:
            name = self._name(token)
            named[f"token_id:{token}" if name in named else name] = value
        return named

    def _entry(self, token: int, logprob: float) -> Json:
        name = self._escaped(token) or self._said(token)
        return {"token": name, "logprob": logprob, "bytes": list(self._bytes(token))}
