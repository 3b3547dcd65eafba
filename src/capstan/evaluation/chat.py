"""Chat templates: a prompt as the messages of a conversation, written as the model's tokenizer writes them.

Source: lm-evaluation-harness 0.4 (`--apply_chat_template`, `--system_instruction`, `--fewshot_as_multiturn`);
HELM, `clients/huggingface_client.py`, whose prompts become one message of the user.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from capstan.errors import InputError
from capstan.evaluation.adapters import RequestState
from capstan.evaluation.models import LanguageModel
from capstan.evaluation.specs import Chat


class Message(NamedTuple):
    """What one of "system", "user" and "assistant" says."""

    role: str
    content: str


def opening(chat: Chat, description: str = "", delimiter: str = "\n\n") -> list[Message]:
    """The system's message, if there is anything to say."""
    told = delimiter.join(filter(None, (chat.system_instruction, description)))
    return [Message("system", told)] if told else []


def chat_text(model: LanguageModel, messages: Sequence[Message], *, continues: bool = False) -> str:
    """Messages by the model's template; `continues`: the last one is begun and goes on.

    Raises:
        InputError: the model's tokenizer has no template, or the template takes no such messages.
    """
    apply = getattr(model, "chat_text", None)
    if apply is None:
        raise InputError(f"{model.name}: this backend knows no chat template; --backend transformers does.")
    return str(apply([message._asdict() for message in messages], continues=continues))


def templated(tokenizer: Any, messages: Sequence[dict[str, str]], *, continues: bool) -> str:
    """Messages by a tokenizer's template.

    Raises:
        InputError: there is no template, or it takes no such messages.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise InputError("The model's tokenizer has no chat template; leave --apply-chat-template out.")
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=not continues,
                continue_final_message=continues,
            )
        )
    except (TemplateError, ValueError) as error:
        raise InputError(f"The chat template does not take these messages: {error}") from error


def num_chat_tokens(model: LanguageModel, chat: Chat) -> int:
    """How many tokens a template adds to a prompt."""
    return len(model.encode(chat_text(model, [*opening(chat), Message("user", "")])))


def in_chat(state: RequestState, model: LanguageModel, chat: Chat) -> RequestState:
    """A request whose prompt is the user's message; a scored choice follows it as the assistant's.

    Differs: HELM puts a choice into the user's message, and then scores the template's end.
    """
    request = state.request
    if request.is_scored and not request.continuation:
        return state  # a text to be scored is no conversation
    length = len(request.prompt) - len(request.continuation)
    if not request.prompt.endswith(request.continuation):  # without a space before it, as HELM's empty inputs
        length = len(request.prompt) - len(request.continuation.lstrip())
    told, answer = request.prompt[:length], request.prompt[length:]
    messages = [*opening(chat), Message("user", told)]
    if not request.is_scored and getattr(model, "has_chat_route", False):
        return replace(
            state, request=replace(request, messages=tuple((each.role, each.content) for each in messages))
        )
    prompt = chat_text(model, messages) + answer.lstrip()
    return replace(state, request=replace(request, prompt=prompt, continuation=answer.lstrip()))
