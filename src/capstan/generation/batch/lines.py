"""Lines of a batch file: OpenAI batch requests, and plain `{"prompt": …}` lines.

    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "…", "max_tokens": 64}}
    {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": […]}}
    {"prompt": "…", "max_tokens": 64}

Source: OpenAI's batch input and output objects; vLLM's for what OpenAI does not have, such as `top_k`,
`min_p`, `repetition_penalty`, `ignore_eos` and `chat_template_kwargs`.
Differs: temperature is 0 unless stated, so that the same file gives the same answers.
"""

import re
from collections.abc import Iterable, Set
from typing import Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)

from capstan.errors import CapstanError, InputError, UsageError
from capstan.generation.batch.ids import BatchLine, batch_lines
from capstan.generation.batch.shard import WHOLE, Shard
from capstan.generation.model import Model
from capstan.generation.prompts import chat_tokens, check_bias, check_length, tokens_of
from capstan.generation.requests import Request

# Fields that change nothing here, and the only values of others that this engine can honour.
_IGNORED = frozenset({"model", "user", "metadata", "store", "service_tier", "safety_identifier"})
_ONLY: dict[str, tuple[Any, ...]] = {
    "stream": (False, None),
    "stream_options": (None,),
    "suffix": ("", None),
    "tools": ([], None),
    "tool_choice": ("none", None),
    "parallel_tool_calls": (None,),
    "response_format": ({"type": "text"}, None),
    "reasoning_effort": (None,),
}
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,17}")


class Body(BaseModel):
    """The parameters of a request, as they are written."""

    model_config = ConfigDict(extra="allow", strict=False)

    prompt: StrictStr | list[StrictInt] | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: StrictInt | None = None
    max_completion_tokens: StrictInt | None = None
    temperature: StrictFloat | None = None
    top_k: StrictInt | None = None
    top_p: StrictFloat | None = None
    min_p: StrictFloat | None = None
    repetition_penalty: StrictFloat | None = None
    presence_penalty: StrictFloat | None = None
    frequency_penalty: StrictFloat | None = None
    logit_bias: dict[StrictStr, StrictFloat] | None = None
    seed: StrictInt | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stop_token_ids: list[StrictInt] | None = None
    include_stop_str_in_output: StrictBool = False
    min_tokens: StrictInt | None = None
    n: StrictInt | None = None
    best_of: StrictInt | None = None
    logprobs: StrictBool | StrictInt | None = None
    top_logprobs: StrictInt | None = None
    prompt_logprobs: StrictInt | None = None
    echo: StrictBool = False
    ignore_eos: StrictBool = False
    chat_template_kwargs: dict[str, Any] | None = None


class _Line(BaseModel):
    """An OpenAI batch request."""

    model_config = ConfigDict(extra="forbid")

    custom_id: StrictStr = Field(min_length=1)
    method: Literal["POST"] = "POST"
    url: Literal["/v1/completions", "/v1/chat/completions"] | None = None
    body: dict[str, Any]


class BatchRequest(NamedTuple):
    """A line that can be answered.

    `cuts` says that no new token is wanted: the one that the engine makes anyway is not shown.
    """

    custom_id: str
    request: Request
    is_chat: bool
    echo: bool
    model: str | None = None  # that it asks for, by name
    cuts: bool = False


class BadLine(NamedTuple):
    """A line that cannot be answered, and why."""

    custom_id: str
    reason: str


def parse_lines(
    lines: Iterable[str],
    model: Model,
    *,
    max_tokens: int,
    shard: Shard = WHOLE,
    taken: Set[str] = frozenset(),
) -> list[BatchRequest | BadLine]:
    """Read every line of a shard; what is wrong with one does not stop the others.

    `max_tokens` is for lines that state none, `taken` as in `batch_lines`. Empty lines are passed over.
    """
    return [
        _parse_line(line, model, max_tokens)
        for position, line in enumerate(batch_lines(lines, taken), start=1)
        if shard.holds(position)
    ]


def _parse_line(line: BatchLine, model: Model, max_tokens: int) -> BatchRequest | BadLine:
    try:
        if line.trouble is not None:
            raise InputError(line.trouble)
        body, url = _body_of(line.raw)
        return batch_request(line.custom_id, body, url, model, max_tokens)
    except ValidationError as error:
        reason = first_fault(error)
    except RecursionError:
        reason = "it is nested too deeply to be a request"
    except (CapstanError, ValueError, TypeError) as error:
        reason = str(error)
    return BadLine(line.custom_id, f"line {line.number}: {reason}")


def first_fault(error: ValidationError) -> str:
    """Where a request is not as it should be, and why, in a line."""
    first = error.errors()[0]
    if first["loc"][:1] == ("prompt",):  # what each of its forms lacks would tell less
        return "prompt: Input should be text or a list of token ids"
    where = ".".join(str(part) for part in first["loc"][:2])
    return f"{where}: {first['msg']}"


def _body_of(raw: dict[str, Any]) -> tuple[Body, str | None]:
    if "body" in raw or "url" in raw or "method" in raw:
        line = _Line.model_validate(raw)
        return Body.model_validate(line.body), line.url
    if not isinstance(raw.get("custom_id", ""), str):
        raise InputError(f"custom_id must be text, not {raw['custom_id']!r}")
    plain = {name: value for name, value in raw.items() if name != "custom_id"}
    return Body.model_validate(plain), None


def batch_request(custom_id: str, body: Body, url: str | None, model: Model, max_tokens: int) -> BatchRequest:
    """What a request's parameters ask for, its prompt as tokens. `max_tokens` is for one that states none, or
    what the context leaves room for.

    Raises:
        CapstanError: it cannot be answered.
    """
    _refuse_unknown(body)
    if body.best_of not in (None, body.n or 1):
        raise UsageError(f"best_of={body.best_of} is not n={body.n or 1}: every answer that is made is given")
    is_chat = body.messages is not None
    if (body.prompt is None) == (body.messages is None):
        raise UsageError("a request has either 'prompt' or 'messages'")
    if url is not None and is_chat != (url == "/v1/chat/completions"):
        given, wanted = ("messages", "prompt") if is_chat else ("prompt", "messages")
        raise UsageError(f"url: {url} takes {wanted!r}, but the body has {given!r}")
    if body.chat_template_kwargs and not is_chat:
        raise UsageError("'chat_template_kwargs' is for chats, not for a 'prompt'")
    prompt = (
        chat_tokens(model, body.messages, body.chat_template_kwargs)
        if body.messages is not None
        else tokens_of(model, body.prompt or "")
    )
    cuts = body.max_tokens == 0 and body.max_completion_tokens is None and body.echo and not is_chat
    longest = model.meta_model.max_positions
    fitting = max_tokens if longest is None else max(1, min(max_tokens, longest - len(prompt)))
    request = Request(
        id=custom_id,
        prompt=prompt,
        max_tokens=1 if cuts else _first_stated(body.max_completion_tokens, body.max_tokens, fitting),
        temperature=body.temperature or 0.0,
        top_k=max(0, body.top_k or 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={_token_id(token): bias for token, bias in (body.logit_bias or {}).items()},
        seed=body.seed,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        include_stop_str_in_output=body.include_stop_str_in_output,
        min_tokens=body.min_tokens or 0,
        n=1 if body.n is None else body.n,
        logprobs=_logprobs(body, is_chat),
        prompt_logprobs=_prompt_logprobs(body),
        ignore_eos=body.ignore_eos,
    )
    check_length(model, len(prompt), request.max_tokens)
    check_bias(model, request.logit_bias)
    stated = (body.model_extra or {}).get("model")
    named = stated if isinstance(stated, str) else None
    return BatchRequest(custom_id, request, is_chat, body.echo, named, cuts)


def _first_stated(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _token_id(text: str) -> int:
    """A token id that is written as text, as the names of a JSON object are."""
    if not _TOKEN_ID.fullmatch(text):
        raise UsageError(f"logit_bias: {text!r} is not a token id")
    return int(text)


def _refuse_unknown(body: Body) -> None:
    for name, value in (body.model_extra or {}).items():
        if name in _IGNORED:
            continue
        if name not in _ONLY:
            raise UsageError(f"{name!r} is not a parameter that this engine knows; leave it out")
        if not any(value == known and type(value) is type(known) for known in _ONLY[name]):
            raise UsageError(f"{name}={value!r} is not something this engine does; leave it out")


def _logprobs(body: Body, is_chat: bool) -> int | None:
    if body.top_logprobs and not is_chat:
        raise UsageError("'top_logprobs' is for chats; in a completion 'logprobs' is a number")
    if body.top_logprobs and not body.logprobs:
        raise UsageError("'top_logprobs' needs 'logprobs': true")
    if is_chat:
        return (body.top_logprobs or 0) if body.logprobs else None
    if body.logprobs is None or body.logprobs is False:
        return None
    return int(body.logprobs)


def _prompt_logprobs(body: Body) -> int | None:
    if body.prompt_logprobs is not None:
        return body.prompt_logprobs
    return int(body.logprobs or 0) if body.echo and body.logprobs is not None else None
