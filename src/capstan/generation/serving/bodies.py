"""Bodies of requests: what OpenAI's parameters ask of the engine.

The parameters of one prompt are those of a batch line; a body may hold several prompts.

Source: OpenAI's completions and chat completions; `/tokenize` and `/detokenize` as vLLM names them.
Differs: temperature is 0 unless stated; what this engine does not do is refused rather than passed over.
"""

from dataclasses import dataclass, replace
from json import loads
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, StrictBool, StrictInt, StrictStr, ValidationError
from starlette.requests import Request as HttpRequest

from capstan.errors import CapstanError
from capstan.generation.batch.lines import BatchRequest, Body, batch_request, first_fault
from capstan.generation.model import Model
from capstan.generation.prompts import ContextExceeded
from capstan.generation.serving.limits import Limits
from capstan.generation.serving.replies import Refused

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

Form = TypeVar("Form", bound=BaseModel)


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: StrictBool = False


class GenerationBody(BaseModel):
    """A completion or a chat completion. Beside these fields it has the parameters of a batch line:
    max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty,
    logit_bias, seed, stop, n, logprobs, top_logprobs, prompt_logprobs, echo, ignore_eos,
    chat_template_kwargs."""

    model_config = ConfigDict(extra="allow")

    model: StrictStr | None = None
    prompt: StrictStr | list[StrictInt] | list[StrictStr] | list[list[StrictInt]] | None = None
    messages: list[dict[str, Any]] | None = None
    stream: StrictBool | None = None
    stream_options: _StreamOptions | None = None


class TokenizeBody(BaseModel):
    """Text or a conversation whose tokens are wanted."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: StrictBool = True


class DetokenizeBody(BaseModel):
    """Tokens whose text is wanted."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr | None = None
    tokens: list[StrictInt]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a body asks for: one request for each prompt.

    `cuts` says that no new token was asked for: the one that the engine makes anyway is not shown.
    """

    requests: tuple[BatchRequest, ...]
    is_chat: bool
    streams: bool
    includes_usage: bool
    cuts: bool


async def read_json(http: HttpRequest) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        Refused: 415 for another content type, 400 for what is not a JSON object.
    """
    stated = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if stated != "application/json":
        # Also keeps web pages of other sites out: a browser asks before it sends JSON to a stranger.
        raise Refused(415, f"The body must be JSON, as 'Content-Type: application/json'; not {stated!r}.")
    try:
        body = loads(await http.body())
    except RecursionError:
        raise Refused(400, "The body is nested too deeply to be a request.") from None
    except ValueError as error:
        raise Refused(400, f"The body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refused(400, f"The body must be a JSON object, not {type(body).__name__}.")
    return body


def parse(form: type[Form], raw: dict[str, Any], *, name: str) -> Form:
    """A body in its form, asked of the model that is called `name`.

    Raises:
        Refused: 400 for what is not as it should be, 404 for another model.
    """
    try:
        body = form.model_validate(raw)
    except ValidationError as error:
        where = error.errors()[0]["loc"]
        raise Refused(400, first_fault(error), param=str(where[0]) if where else None) from None
    stated = getattr(body, "model", None)
    if stated is not None and stated != name:
        raise Refused(
            404,
            f"There is no model {stated!r} here; this server has {name!r}.",
            code="model_not_found",
            param="model",
        )
    return body


def asked_of(
    body: GenerationBody, *, name: str, is_chat: bool, model: Model, limits: Limits, room: int
) -> Asked:
    """What a body asks for, its prompts as tokens; `name` becomes the beginning of the requests' ids. At most
    `room` answers can be asked for at once.

    Raises:
        Refused: it asks for what this engine does not do, or for more than a limit.
    """
    prompts = _each_prompt(body)
    _require_answers(len(prompts), room)  # before they are tokenised
    extra = dict(body.model_extra or {})
    cuts = extra.get("max_tokens") == 0 and bool(extra.get("echo")) and not is_chat
    if cuts:
        extra["max_tokens"] = 1
    try:
        requests = tuple(
            _request(f"{name}-{number}", extra | one, is_chat, model, limits)
            for number, one in enumerate(prompts)
        )
    except ValidationError as error:
        where = error.errors()[0]["loc"]
        raise Refused(400, first_fault(error), param=str(where[0]) if where else None) from None
    except RecursionError:
        raise Refused(400, "The body is nested too deeply to be a request.") from None
    except ContextExceeded as error:
        raise Refused(400, str(error), code="context_length_exceeded") from None
    except (CapstanError, ValueError, TypeError) as error:
        raise Refused(400, str(error)) from None
    _require_answers(sum(asked.request.n for asked in requests), room)
    streams = bool(body.stream)
    if body.stream_options is not None and not streams:
        raise Refused(400, "'stream_options' is for streams; leave it out.", param="stream_options")
    shows_prompt = any(asked.request.prompt_logprobs is not None for asked in requests)
    if streams and shows_prompt:
        raise Refused(400, "Log-probabilities of the prompt do not come in a stream; leave 'stream' out.")
    return Asked(
        requests=requests,
        is_chat=is_chat,
        streams=streams,
        includes_usage=body.stream_options is not None and body.stream_options.include_usage,
        cuts=cuts,
    )


def _require_answers(count: int, room: int) -> None:
    if count > room:
        raise Refused(
            400, f"{count:,} answers at once exceed the queue of {room:,}; ask in several requests."
        )


def _each_prompt(body: GenerationBody) -> list[dict[str, Any]]:
    prompt = body.prompt
    if prompt == []:
        raise Refused(400, "The prompt is empty; a prompt needs at least one token.", param="prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return [{"prompt": each, "messages": body.messages} for each in prompt]
    return [{"prompt": prompt, "messages": body.messages}]


def _request(
    custom_id: str, raw: dict[str, Any], is_chat: bool, model: Model, limits: Limits
) -> BatchRequest:
    body = Body.model_validate(raw)
    says_how_many = body.max_completion_tokens is not None or body.max_tokens is not None
    asked = batch_request(custom_id, body, CHAT if is_chat else COMPLETIONS, model, 1)
    if len(asked.request.stop) > limits.stop_texts:
        raise Refused(400, f"At most {limits.stop_texts} stop texts can be looked for.", param="stop")
    num_prompt = len(asked.request.prompt)
    if not says_how_many:
        room = max(1, limits.longest - num_prompt)
        asked = asked._replace(request=replace(asked.request, max_tokens=min(limits.max_tokens, room)))
    require_room(num_prompt, asked.request.max_tokens, limits)
    return asked


def require_room(num_prompt: int, num_new: int, limits: Limits) -> None:
    """Refuse a prompt and answer that are longer than a slot."""
    if num_prompt + num_new > limits.longest:
        raise Refused(
            400,
            f"A prompt of {num_prompt:,} tokens and {num_new:,} new ones exceed the {limits.longest:,} that "
            "this server keeps room for (--max-length). Shorten the prompt or lower max_tokens.",
            code="context_length_exceeded",
        )
