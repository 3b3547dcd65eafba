"""A long text in windows that fit the model, in which every token is predicted once.

The first window has the model's prefix token before it; later ones have as much context on the left as fits.

Source: HELM, `LanguageModelingAdapter`, after EleutherAI's lm_perplexity.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from capstan.errors import InputError
from capstan.evaluation.models import LanguageModel

# What undecodable bytes become; a token that holds part of a character decodes to it.
_BROKEN = "\ufffd"


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
    done = min(limits.max_sequence_length, len(tokens))
    prefix = model.encode(limits.prefix_token) if limits.prefix_token else []
    first = _window(prefix, tokens[:done], longest, model)
    yield Window(first.text, 1 if limits.prefix_token else 0)
    while done < len(tokens):
        end = done + min(len(tokens) - done, longest - 1)
        yield _window(tokens[end - longest : done], tokens[done:end], longest, model)
        done = end


def _window(context: Sequence[int], wanted: Sequence[int], longest: int, model: LanguageModel) -> Window:
    raw, wanted = _fitted(context, wanted, longest, model)
    text = raw.strip(_BROKEN)
    if len(text) == len(raw):
        return Window(text, len(context))
    # Characters cut in half at the ends are left out, and with them their tokens.
    leading = longest - len(model.encode(raw.lstrip(_BROKEN)))
    trailing = longest - len(model.encode(raw.rstrip(_BROKEN)))
    if trailing >= len(wanted):
        return Window(text, len(model.encode(text)))
    return Window(text, 1 if leading >= len(context) else len(context) - leading)


def _fitted(
    context: Sequence[int], wanted: Sequence[int], longest: int, model: LanguageModel
) -> tuple[str, Sequence[int]]:
    """The text of context and wanted tokens; as decoding and encoding may give more tokens, cut to fit."""
    text = model.decode([*context, *wanted])
    excess = len(model.encode(text)) - longest
    while excess > 0:
        wanted = wanted[: len(wanted) - excess]
        if not wanted:
            raise InputError(
                f"No token of a text fits the model's {longest} tokens: its tokenizer does not give "
                f"back what "
                "it is given. Evaluate with a larger context."
            )
        text = model.decode([*context, *wanted])
        excess = len(model.encode(text)) - longest
    return text, wanted
