"""A long text in windows that fit the model, in which every token is predicted once.

The first window has the model's prefix token before it; later ones have as much context on the left as fits.

Source: HELM, `LanguageModelingAdapter`, after EleutherAI's lm_perplexity.

Differs: windows end with whole characters, where HELM leaves out those that a window cuts in half; tokens
that do not fit a window are asked in the next one, where HELM leaves them out.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from capstan.errors import InputError
from capstan.evaluation.models import LanguageModel

# What undecodable bytes become; a token that holds part of a character decodes to it.
_BROKEN = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes, and so tokens


class Window(NamedTuple):
    """A text to score, of which the first `num_conditioning_tokens` are context only."""

    text: str
    num_conditioning_tokens: int


def text_windows(text: str, model: LanguageModel, *, num_new: int = 0) -> Iterator[Window]:
    """The windows of a text.

    Raises:
        InputError: not a single token fits.
    """
    limits = model.limits
    longest = limits.max_request_length - num_new
    tokens = model.encode(text)
    done, before, size = _Place(0, 0), limits.prefix_token, limits.max_sequence_length
    while True:
        end = _reached(text, tokens, done, size, model)
        if done.token:
            before = _context(text, tokens[max(0, end.token - longest) : done.token], done.character, model)
        # Encoded again, it may have more tokens: context goes first, then tokens wait for the next window.
        while (excess := len(model.encode(before + text[done.character : end.character])) - longest) > 0:
            if done.token and len(before) > 1:
                before = before[1:]
                continue
            size = end.token - done.token - excess
            if size <= 0:
                raise InputError(
                    f"No token of a text fits the model's {longest} tokens: its tokenizer does not give back "
                    "what it is given. Evaluate with a larger context."
                )
            end = _reached(text, tokens, done, size, model)
        yield Window(
            before + text[done.character : end.character], len(model.encode(before)) if before else 0
        )
        if end.token == len(tokens):
            return
        done, size = end, longest - 1


class _Place(NamedTuple):
    """So many tokens of a text, which are so many characters."""

    token: int
    character: int


def _reached(text: str, tokens: Sequence[int], done: _Place, size: int, model: LanguageModel) -> _Place:
    """Where a window of at most `size` more tokens ends: with the text, or before a character that it would
    cut in half."""
    end = done.token + size
    if end >= len(tokens):
        return _Place(len(tokens), len(text))
    for place in range(end, max(done.token, end - _LONGEST_CHARACTER), -1):
        piece = model.decode(tokens[done.token : place])
        for lead in ("", " "):  # which SentencePiece leaves out of what it decodes
            if text.startswith(lead + piece, done.character):
                return _Place(place, done.character + len(lead + piece))
    # The tokenizer does not give back what it is given: as many characters as it does give.
    piece = model.decode(tokens[done.token : end]).strip(_BROKEN)
    return _Place(end, min(len(text), done.character + len(piece)))


def _context(text: str, tokens: Sequence[int], end: int, model: LanguageModel) -> str:
    """What tokens before a character of a text say of it, from their first whole character on."""
    for start in range(min(_LONGEST_CHARACTER, len(tokens))):
        piece = model.decode(tokens[start:])
        if text.endswith(piece, 0, end):
            return text[end - len(piece) : end]
    return text[max(0, end - len(model.decode(tokens).strip(_BROKEN))) : end]
