"""From what a user writes to token ids."""

from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from typing import Any

from capstan.errors import InputError
from capstan.generation.model import Model

# Parameters of transformers' `apply_chat_template` that it hands to the template as they are.
_VARIABLES = frozenset({"tools", "documents"})


def tokens_of(model: Model, prompt: str | Sequence[int]) -> list[int]:
    """A prompt's token ids.

    Raises:
        InputError: text without a tokenizer, ids outside the vocabulary, an empty prompt.
    """
    if not isinstance(prompt, str):
        tokens = [int(token) for token in prompt]
    elif model.tokenizer is None:
        raise InputError(f"{model.folder.name} has no tokenizer; give prompts as lists of token ids.")
    else:
        tokens = list(model.tokenizer(_whole(prompt))["input_ids"])
    if not tokens:
        raise InputError("The prompt is empty; a prompt needs at least one token.")
    _check_tokens(model, tokens, "A prompt")
    return tokens


def check_bias(model: Model, logit_bias: Mapping[int, float]) -> None:
    """Raise `InputError` if tokens are to be biased that the model does not have."""
    _check_tokens(model, logit_bias, "logit_bias")


def _check_tokens(model: Model, tokens: Iterable[int], what: str) -> None:
    size = model.meta_model.vocabulary_size
    if not all(0 <= token < size for token in tokens):
        raise InputError(f"{what} has token ids outside 0 … {size - 1}, the model's vocabulary.")


def chat_tokens(
    model: Model, messages: Sequence[dict[str, Any]], template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """The token ids of a conversation, by the model's own chat template, up to where the answer begins.

    A content that is a list of text parts is one text, the parts put together as they are. The template gets
    `template_kwargs` as variables, as transformers' `apply_chat_template` gives them.

    Raises:
        InputError: there is no chat template, it refuses the messages, a part is not text, or a variable is
            one of `apply_chat_template`'s own settings.
    """
    template = getattr(model.tokenizer, "chat_template", None)
    if template is None:
        raise InputError(
            f"{model.folder.name} has no chat template, so 'messages' cannot become a prompt. "
            "Give 'prompt' instead, or add a chat_template to tokenizer_config.json."
        )
    from jinja2 import TemplateError

    variables = dict(template_kwargs or {})
    own = sorted(
        (signature(model.tokenizer.apply_chat_template).parameters.keys() - _VARIABLES) & variables.keys()
    )
    if own:
        raise InputError(
            f"chat_template_kwargs: {own[0]!r} is no variable of a chat template but a setting of how it is "
            "used; leave it out."
        )
    plain = [_in_plain_text(message, number) for number, message in enumerate(messages, start=1)]
    try:
        text = model.tokenizer.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=True, **variables
        )
    except (TemplateError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"The chat template of {model.folder.name} refuses these messages: {error}"
        ) from error
    tokens = list(model.tokenizer(_whole(text), add_special_tokens=False)["input_ids"])
    return tokens_of(model, tokens)


def _whole(text: str) -> str:
    """The text, if it is one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"The prompt has half of a surrogate pair, {text[error.start]!r}, which is no character; write "
            "the character itself or both halves."
        ) from None
    return text


def _in_plain_text(message: dict[str, Any], number: int) -> dict[str, Any]:
    """A message whose content is not a list of parts but their text."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    for at, part in enumerate(parts, start=1):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else part
            raise InputError(
                f"message {number}, part {at}: {kind!r} is not text that can be read; this engine takes only "
                'parts such as {"type": "text", "text": "…"}.'
            )
    return {**message, "content": "".join(part["text"] for part in parts)}


class ContextExceeded(InputError):
    """A prompt and what is to follow it are longer than the model's context."""


def check_length(model: Model, num_prompt_tokens: int, num_new: int) -> None:
    """Raise `ContextExceeded` if a prompt and its answer exceed the model's context."""
    longest = model.meta_model.max_positions
    if longest is not None and num_prompt_tokens + num_new > longest:
        raise ContextExceeded(
            f"A prompt of {num_prompt_tokens:,} tokens and {num_new:,} new ones exceed the model's "
            f"context of {longest:,}. Shorten the prompt or lower max_tokens."
        )
