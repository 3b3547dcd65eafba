"""From token ids to text, a token at a time, so that a piece that was given out is never taken back.

What a token says depends on its neighbours: a character may be spread over several tokens, and tokenizers in
the style of SentencePiece drop the space of whatever comes first. So new tokens are decoded together with a
few before them, the prompt's last ones at the beginning, and what those alone decode to is taken off:

    piece = decode(before + new) - decode(before)

A piece waits until its last character is whole. All pieces together are the text.

Source: the prefix offset method of Text Generation Inference and vLLM.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

# What decoders put for bytes that are no whole character.
UNFINISHED = "\ufffd"
# So many tokens before the new ones are decoded with them: more than a character has bytes.
_CONTEXT_TOKENS = 6
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _after(known: str, longer: str) -> str:
    """What `longer` has beyond `known`; a broken character at the end of `known` may have become whole."""
    if longer.startswith(known):
        return longer[len(known) :]
    shared = next((at for at, pair in enumerate(zip(known, longer, strict=False)) if pair[0] != pair[1]), 0)
    return longer[shared:] if set(known[shared:]) == {UNFINISHED} else longer[len(known) :]


class TokenTexts:
    """What the tokens of a tokenizer say; nothing where there is no tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        self.special: dict[int, str] = {
            int(token): str(entry.content) for token, entry in added.items() if entry.special
        }
        self._bytes_of_letter = _byte_level_alphabet()
        self._texts: dict[tuple[int, bool], str] = {}

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        if self._tokenizer is None or not tokens:
            return ""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def is_visible(self, token: int) -> bool:
        """Whether the token is part of a text, as special ones are not."""
        return token not in self.special

    def context(self, tokens: Sequence[int]) -> list[int]:
        """The last tokens that are part of a text: those on which the text of the next one depends. They do
        not begin in the middle of a character, which would spoil the bytes after it."""
        found: list[int] = []
        for token in reversed(tokens):
            if self.is_visible(token):
                found.append(token)
                if len(found) >= _CONTEXT_TOKENS and UNFINISHED not in self.text(token, is_first=True):
                    break
        return found[::-1]

    def continuation(self, before: Sequence[int], tokens: Sequence[int]) -> str:
        """The text that `tokens` add to the text of the tokens before them."""
        context = self.context(before)
        visible = [token for token in tokens if self.is_visible(token)]
        text = _after(self.decode(context), self.decode([*context, *visible])) if visible else ""
        if UNFINISHED not in text:
            return text
        # Bytes that are no text spoil whole ones beside them if they are decoded together: so as they came.
        pieces = Detokenizer(self, before)
        return "".join([*map(pieces.feed, visible), pieces.flush()])

    def text(self, token: int, *, is_first: bool = False) -> str:
        """What one token says in the middle of a text, or as the first of one; a special token its name.

        Bytes that are no character by themselves show as U+FFFD.
        """
        if token in self.special:
            return self.special[token]
        key = (token, is_first)
        if key not in self._texts:
            alone = self.decode([token])
            # After itself, which is a neighbour as good as any: it keeps the space that a first token loses.
            self._texts[key] = (
                alone if is_first or UNFINISHED in alone else _after(alone, self.decode([token, token]))
            )
        return self._texts[key]

    def bytes_of(self, token: int, *, is_first: bool = False) -> bytes:
        """The bytes that a token adds to a text, also for part of a character; for a special token none."""
        if token in self.special:
            return b""
        text = self.text(token, is_first=is_first)
        if UNFINISHED not in text:
            return text.encode(errors="surrogatepass")
        name = self._name(token)
        if (found := _BYTE_TOKEN.fullmatch(name)) is not None:
            return bytes([int(found[1], 16)])
        if all(letter in self._bytes_of_letter for letter in name):
            return bytes(self._bytes_of_letter[letter] for letter in name)
        return text.encode(errors="surrogatepass")

    def _name(self, token: int) -> str:
        """The token as the vocabulary has it."""
        convert = getattr(self._tokenizer, "convert_ids_to_tokens", None)
        return str(convert(token)) if convert is not None else ""


@lru_cache(maxsize=8)
def texts_of(tokenizer: Any) -> TokenTexts:
    """The texts of a tokenizer's tokens, remembered while it is in use."""
    return TokenTexts(tokenizer)


@lru_cache(maxsize=1)
def _byte_level_alphabet() -> dict[str, int]:
    """The letters of byte-level vocabularies: printable bytes as they are, the others from U+0100 on.

    Source: GPT-2's encoder (Radford et al. 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {
        chr(256 + at): value for at, value in enumerate(others)
    }


class Detokenizer:
    """The text of tokens that come one by one, after others."""

    def __init__(self, texts: TokenTexts, before: Sequence[int] = ()) -> None:
        self._texts = texts
        self._tokens = texts.context(before)
        self._start, self._end = 0, len(self._tokens)  # decoded again, since new ones depend on them

    @property
    def is_first(self) -> bool:
        """Whether the next token begins the text."""
        return not self._tokens

    def feed(self, token: int) -> str:
        """The text that is final now."""
        if not self._texts.is_visible(token):
            return ""
        self._tokens.append(token)
        known, longer = self._decoded()
        piece = _after(known, longer)
        if not piece or longer.endswith(UNFINISHED):
            return ""
        if not known.endswith(UNFINISHED):  # else a character that began before would lose its beginning
            self._start = self._end
        self._end = len(self._tokens)
        return piece

    def flush(self) -> str:
        """What waits for the rest of a character, as it is."""
        piece = _after(*self._decoded())
        self._start = self._end = len(self._tokens)
        return piece

    def _decoded(self) -> tuple[str, str]:
        """The text of the tokens that are decoded again, and with those that wait."""
        known = self._texts.decode(self._tokens[self._start : self._end])
        return known, self._texts.decode(self._tokens[self._start :])


class AnswerText:
    """The text of an answer while it grows, and where special tokens lie in it.

    `shown` has special tokens by name, so that a stop text may hold them; `text` is what people read.
    """

    def __init__(self, texts: TokenTexts, prompt: Sequence[int]) -> None:
        self._texts, self._detokenizer = texts, Detokenizer(texts, prompt)
        self.text, self.shown = "", ""
        self._hidden: list[tuple[int, int]] = []  # of `shown`, what is not part of `text`

    def feed(self, token: int) -> None:
        """Take the next token."""
        name = self._texts.special.get(token)
        if name is None:
            self._add(self._detokenizer.feed(token))
        else:
            self._hidden.append((len(self.shown), len(self.shown) + len(name)))
            self.shown += name

    def flush(self) -> None:
        """Nothing more comes: what waited is shown as it is."""
        self._add(self._detokenizer.flush())

    def _add(self, piece: str) -> None:
        self.text += piece
        self.shown += piece

    def until(self, place: int) -> str:
        """The text before a place in `shown`."""
        return self.text[: place - sum(max(0, min(place, end) - start) for start, end in self._hidden)]

    def find(self, stops: Sequence[str], *, ends_after: int = 0) -> tuple[int, int] | None:
        """Where the first stop text in `shown` that ends after a place lies: from, and up to."""
        found = [
            (place, place + len(stop))
            for stop in stops
            if (place := self.shown.find(stop, max(0, ends_after - len(stop) + 1))) >= 0
        ]
        return min(found, key=lambda span: span[0], default=None)

    def final(self, stops: Sequence[str]) -> str:
        """The text without its end where that may become a stop text."""
        longest = min(max(map(len, stops), default=1) - 1, len(self.shown))
        for count in range(longest, 0, -1):
            if any(stop.startswith(self.shown[-count:]) for stop in stops):
                return self.until(len(self.shown) - count)
        return self.text
