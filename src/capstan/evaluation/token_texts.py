"""What tokens say: pieces of a text that together are the text, whatever the tokenizer's alphabet.

A token decoded by itself loses the space that SentencePiece's word mark stands for, and part of a character
becomes U+FFFD, three bytes; so pieces are cut from the text instead. Of a character spread over several
tokens one has all of it, the others are empty.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from capstan.evaluation.models import Completion, Token

_BROKEN = "\ufffd"
# So many of a prompt's last tokens are decoded with those after them: more than a character has bytes.
_NUM_BEFORE = 8


class Pieces(NamedTuple):
    """A text's token ids, and what each says; tokens that the tokenizer puts around a text say nothing."""

    ids: list[int]
    texts: list[str]


def pieces_of(tokenizer: Any, text: str, *, adds_special: bool) -> Pieces:
    """A text in tokens: their texts joined are the text."""
    if not getattr(tokenizer, "is_fast", False):
        ids = list(tokenizer(text, add_special_tokens=adds_special)["input_ids"])
        growing = GrowingText(tokenizer.decode, ())
        for token in ids:
            growing.add(token)
        return Pieces(ids, cut_at_ends(text, accumulate(map(len, growing.finished()))))
    told = tokenizer(text, add_special_tokens=adds_special, return_offsets_mapping=True)
    return Pieces(list(told["input_ids"]), cut_at_ends(text, (end for _, end in told["offset_mapping"])))


def cut_at_ends(text: str, ends: Iterable[int]) -> list[str]:
    """A text in pieces, each up to its end and the last up to the text's own."""
    pieces, done = [], 0
    for end in ends:
        pieces.append(text[done:end])
        done = max(done, end)
    if pieces and done < len(text):
        pieces[-1] += text[done:]
    return pieces


class GrowingText:
    """The text of an answer as its tokens come, after a prompt's last ones.

    Source: the prefix offset method of Text Generation Inference: new tokens are decoded with those before
    them, and what those alone decode to is taken off; a character waits until it is whole.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(before[-_NUM_BEFORE:])
        self._start, self._done = 0, len(self._ids)
        self._texts: list[str] = []
        self.text = ""

    def add(self, token: int) -> None:
        """One more token."""
        self._ids.append(token)
        piece = self._waiting()
        if not piece or piece.endswith(_BROKEN):
            self._texts.append("")
            return
        self._start, self._done = self._done, len(self._ids)
        self._texts.append(piece)
        self.text += piece

    def _waiting(self) -> str:
        known = self._decode(self._ids[self._start : self._done])
        return str(self._decode(self._ids[self._start :])[len(known) :])

    def finished(self) -> list[str]:
        """What each token says, at the end of all: a character that never became whole is the last one's."""
        if self._texts and self._done < len(self._ids):
            rest = self._waiting()
            self._texts[-1] += rest
            self.text += rest
            self._done = len(self._ids)
        return self._texts


def after_special(ids: Sequence[int], special: Iterable[int]) -> list[int]:
    """The tokens after the last special one: what a decoder takes as the text's beginning begins there."""
    marked = set(special)
    at = next((at for at in range(len(ids), 0, -1) if ids[at - 1] in marked), 0)
    return list(ids[at:])


def num_covering(texts: Sequence[str], ending: str) -> int:
    """How many of the last tokens say an ending of their text; at least one that says part of it."""
    count, length = 0, 0
    while count < len(texts) and length < len(ending):
        count += 1
        length += len(texts[-count])
    return count


def cut_at_stops(text: str, tokens: Sequence[Token], stops: Sequence[str], reason: str) -> Completion:
    """An answer without its stop text and what follows; tokens that lie behind it are dropped."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    if not places:
        return Completion(text=text, tokens=tuple(tokens), finish_reason=reason)
    text = text[: min(places)]
    return Completion(text=text, tokens=tokens_within(text, tokens), finish_reason="stop")


def tokens_within(text: str, tokens: Sequence[Token]) -> tuple[Token, ...]:
    """The first tokens, as many as say the text."""
    kept: list[Token] = []
    length = 0
    for token in tokens:
        if length >= len(text):
            break
        kept.append(token)
        length += len(token.text)
    return tuple(kept)
