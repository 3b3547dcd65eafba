"""The server's routes: completions, chats, tokens, models, health and metrics."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from capstan.errors import CapstanError
from capstan.generation.batch.answers import answer_body
from capstan.generation.prompts import chat_tokens
from capstan.generation.requests import Completion
from capstan.generation.serving.bodies import (
    Asked,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
    asked_of,
    parse,
    read_json,
)
from capstan.generation.serving.crew import Crew, CrewGone, Overloaded
from capstan.generation.serving.guard import Guard
from capstan.generation.serving.limits import Limits
from capstan.generation.serving.replies import Refused, refusal, reply
from capstan.generation.serving.streams import EventReply, events_of, until_gone

_GONE = 499  # nobody reads it
_LONG_BYTES = 16_000  # tokenised in some milliseconds

Found = TypeVar("Found")


class Served:
    """What the routes share: the crew, the model's name, limits, and when the server started."""

    def __init__(self, crew: Crew, *, name: str, limits: Limits) -> None:
        self.crew, self.model, self.name, self.limits = crew, crew.engine.model, name, limits
        self.started = int(time.time())


def build_app(
    served: Served,
    *,
    token: str | None = None,
    hosts: frozenset[str] | None = None,
    folder: Path | None = None,
    allow_origins: Sequence[str] = (),
) -> FastAPI:
    """The server over a crew, which it starts and closes.

    Args:
        token: what clients must show; None lets everybody in.
        hosts: names by which clients must call the server; None allows any.
        folder: where files and batches lie; None for a server without them.
        allow_origins: web pages, as `https://example.org`, whose scripts may ask too; "*" for all.
    """
    from capstan.generation.serving.batches import BatchRunner
    from capstan.generation.serving.file_routes import add_file_routes
    from capstan.generation.serving.files import FileStore

    store = FileStore(folder, limit=served.limits.file_bytes) if folder is not None else None
    runner = BatchRunner(store, served.crew, served.limits, name=served.name) if store is not None else None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        served.crew.start()
        if runner is not None:
            runner.start()
        try:
            yield
        finally:
            if runner is not None:
                await runner.close()
            await served.crew.close(within_s=600.0)

    app = FastAPI(title=f"capstan serve {served.name}", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, token=token, hosts=hosts, limits=served.limits)
    if allow_origins:  # outside the guard: a browser asks first, without the token
        app.add_middleware(
            CORSMiddleware, allow_origins=list(allow_origins), allow_methods=["*"], allow_headers=["*"]
        )
    _add_error_handlers(app)
    _add_generation_routes(app, served)
    _add_other_routes(app, served)
    add_file_routes(app, store, runner)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: HttpRequest, error: Refused) -> Response:
        return refusal(error)

    @app.exception_handler(Overloaded)
    async def overloaded(_: HttpRequest, error: Overloaded) -> Response:
        after = {"Retry-After": str(error.retry_after_s)}
        return refusal(Refused(429, str(error), code="queue_full", headers=after))

    @app.exception_handler(CrewGone)
    async def gone(_: HttpRequest, error: CrewGone) -> Response:
        return refusal(Refused(503, str(error)))

    @app.exception_handler(HTTPException)
    async def http_error(http: HttpRequest, error: HTTPException) -> Response:
        message = f"{http.method} {http.url.path}: {error.detail}."
        return refusal(Refused(error.status_code, message, headers=error.headers))

    @app.exception_handler(Exception)
    async def bug(_: HttpRequest, error: Exception) -> Response:
        return refusal(Refused(500, f"The server failed: {type(error).__name__}."))


def _body_of(form: type[Any]) -> dict[str, Any]:
    """How a route's body is described to programs."""
    return {"requestBody": {"content": {"application/json": {"schema": form.model_json_schema()}}}}


# --- generation ------------------------------------------------------------------------------------------


def _add_generation_routes(app: FastAPI, served: Served) -> None:
    described = _body_of(GenerationBody)

    @app.post("/v1/completions", openapi_extra=described)
    async def completions(http: HttpRequest) -> Response:
        return await _generate(http, served, is_chat=False)

    @app.post("/v1/chat/completions", openapi_extra=described)
    async def chat_completions(http: HttpRequest) -> Response:
        return await _generate(http, served, is_chat=True)


async def _generate(http: HttpRequest, served: Served, *, is_chat: bool) -> Response:
    body = parse(GenerationBody, await read_json(http), name=served.name)
    name = f"{'chatcmpl' if is_chat else 'cmpl'}-{token_hex(12)}"
    crew, limits = served.crew, served.limits
    asked = await _apart(
        len(await http.body()) > _LONG_BYTES,
        partial(
            asked_of,
            body,
            name=name,
            is_chat=is_chat,
            model=served.model,
            limits=limits,
            room=crew.slots + limits.queue,
        ),
    )
    requests = [one.request for one in asked.requests]
    if asked.streams:
        ask = crew.ask(requests, follows=True)
        frame = {
            "id": name,
            "object": "chat.completion.chunk" if is_chat else "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }
        return EventReply(http, events_of(ask, asked, frame), on_end=lambda: crew.drop(ask))
    with crew.asking(requests) as ask:
        leaving = asyncio.create_task(until_gone(http))
        try:
            await asyncio.wait((ask.done, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
        if not ask.done.done():
            return Response(status_code=_GONE)
        ask.done.result()  # raises what went wrong
        has_logprobs = any(one.request.logprobs is not None for one in asked.requests)
        return await _apart(has_logprobs, partial(_together, asked, ask.completions(), served, name))


async def _apart(is_long: bool, work: Callable[[], Found]) -> Found:
    """Do what takes long in another thread, so that others are served meanwhile; handing over what does not
    would take longer than doing it."""
    return await asyncio.to_thread(work) if is_long else work()


def _together(asked: Asked, completions: list[Completion], served: Served, name: str) -> Response:
    """The answers to all prompts of a body, in one object that is called `name`."""
    created = int(time.time())
    bodies = [
        answer_body(one, done, served.model, created=created)
        for one, done in zip(asked.requests, completions, strict=True)
    ]
    choices = [choice for body in bodies for choice in body["choices"]]
    usage = {name: sum(body["usage"][name] for body in bodies) for name in bodies[0]["usage"]}
    numbered = [choice | {"index": index} for index, choice in enumerate(choices)]
    own = {"id": name, "model": served.name, "choices": numbered, "usage": usage}
    return reply(bodies[0] | own)


# --- the rest --------------------------------------------------------------------------------------------


def _add_other_routes(app: FastAPI, served: Served) -> None:
    card = {
        "id": served.name,
        "object": "model",
        "created": served.started,
        "owned_by": "capstan",
        "max_model_len": served.limits.longest,
    }

    @app.get("/v1/models")
    async def models() -> Response:
        return reply({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != served.name:
            raise Refused(404, f"There is no model {name!r} here; this server has {served.name!r}.")
        return reply(card)

    @app.post("/tokenize", openapi_extra=_body_of(TokenizeBody))
    async def tokenize(http: HttpRequest) -> Response:
        body = parse(TokenizeBody, await read_json(http), name=served.name)
        tokens = await _in_a_thread(lambda: _tokens(body, served))
        return reply({"count": len(tokens), "max_model_len": served.limits.longest, "tokens": tokens})

    @app.post("/detokenize", openapi_extra=_body_of(DetokenizeBody))
    async def detokenize(http: HttpRequest) -> Response:
        body = parse(DetokenizeBody, await read_json(http), name=served.name)
        return reply({"prompt": await _in_a_thread(lambda: _text(body.tokens, served))})

    @app.get("/health")
    async def health() -> Response:
        if served.crew.failure is not None:
            raise CrewGone(served.crew.failure)
        return reply({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(_metrics(served.crew), media_type="text/plain; version=0.0.4")


async def _in_a_thread(work: Callable[[], Any]) -> Any:
    try:
        return await asyncio.to_thread(work)
    except (CapstanError, ValueError, TypeError) as error:
        raise Refused(400, str(error)) from None


def _tokens(body: TokenizeBody, served: Served) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise Refused(400, "Give either 'prompt' or 'messages'.")
    if body.messages is not None:
        return chat_tokens(served.model, body.messages, body.chat_template_kwargs)
    if served.model.tokenizer is None:
        raise Refused(400, f"{served.name} has no tokenizer; its prompts are token ids.")
    encoded = served.model.tokenizer(body.prompt, add_special_tokens=body.add_special_tokens)
    return list(encoded["input_ids"])


def _text(tokens: list[int], served: Served) -> str:
    if served.model.tokenizer is None:
        raise Refused(400, f"{served.name} has no tokenizer; its tokens have no text.")
    size = served.model.meta_model.vocabulary_size
    if not all(0 <= token < size for token in tokens):
        raise Refused(400, f"There are token ids outside 0 … {size - 1}, the model's vocabulary.")
    return str(served.model.tokenizer.decode(tokens))


def _metrics(crew: Crew) -> str:
    """The counts in Prometheus's text format."""
    counts = crew.counts
    figures = [
        ("requests_total", "counter", "Requests taken.", counts.asks),
        ("requests_refused_total", "counter", "Requests for which there was no room.", counts.refused),
        ("sequences_finished_total", "counter", "Answers that were finished.", counts.finished),
        ("sequences_dropped_total", "counter", "Answers that nobody waited for any more.", counts.dropped),
        ("prompt_tokens_total", "counter", "Tokens of answered prompts.", counts.prompt_tokens),
        ("generated_tokens_total", "counter", "Tokens of finished answers.", counts.new_tokens),
        ("sweeps_total", "counter", "Sweeps over the layers.", counts.sweeps),
        ("sequences_running", "gauge", "Answers that have a slot.", counts.running),
        ("sequences_waiting", "gauge", "Answers that wait for a slot.", crew.num_waiting),
        ("slots", "gauge", "Answers that can run at a time.", crew.slots),
    ]
    lines = []
    for name, kind, words, value in figures:
        lines += [f"# HELP capstan_{name} {words}", f"# TYPE capstan_{name} {kind}"]
        lines.append(f"capstan_{name} {value}")
    return "\n".join(lines) + "\n"
