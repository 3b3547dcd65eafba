"""Streams: answers as server-sent events, while they grow."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from capstan.generation.batch.lines import BatchRequest
from capstan.generation.batch.logprobs import Json, LogprobWriter
from capstan.generation.detokenizer import AnswerText, TokenTexts
from capstan.generation.runtime.sequences import Sequence as Growing
from capstan.generation.serving.bodies import Asked
from capstan.generation.serving.crew import Ask, CrewGone
from capstan.generation.serving.replies import encoded, error_body


class TextSoFar:
    """The text of a sequence as its tokens come, in pieces that are final.

    Held back are characters whose last bytes have not come, and what may become a stop text. All pieces
    together are the answer's text.
    """

    def __init__(self, texts: TokenTexts, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._text, self._stop = AnswerText(texts, prompt), stop
        self._num_tokens, self._num_sent = 0, 0

    def grow(self, tokens: Sequence[int]) -> str:
        """The next piece, with all tokens so far."""
        for token in tokens[self._num_tokens :]:
            self._text.feed(token)
        self._num_tokens = max(self._num_tokens, len(tokens))
        return self._send(self._text.final(self._stop))

    def finish(self, text: str) -> str:
        """The last piece; `text` is the answer's."""
        return self._send(text)

    def _send(self, text: str) -> str:
        piece, self._num_sent = text[self._num_sent :], max(self._num_sent, len(text))
        return piece


class _Choice:
    """One answer on its way: what of it has been sent. With `cuts`, no new token was asked for."""

    def __init__(self, index: int, asked: BatchRequest, growing: Growing, *, cuts: bool) -> None:
        self.index, self._asked, self._growing, self._cuts = index, asked, growing, cuts
        self._text = TextSoFar(growing.texts, growing.prompt, growing.request.stop)
        self._echoed = growing.texts.decode(growing.prompt) if asked.echo else ""
        self._writer = LogprobWriter(growing.tokenizer, growing.prompt, offset=len(self._echoed))
        self._num_tokens, self._has_begun = 0, False
        self.is_over = False

    def events(self) -> list[Json]:
        """Choices of the events that are due."""
        if self.is_over:
            return []
        # In this order: the engine's thread appends the last token before it says that all is over.
        reason = self._growing.finish_reason
        num_tokens = self._growing.num_passed if reason is None else len(self._growing.generated)
        if num_tokens == self._num_tokens and reason is None:
            return []
        begins = [] if self._has_begun else self._beginning()
        self._has_begun = True
        self.is_over = reason is not None
        due = [] if self._cuts else self._new(num_tokens)
        ends = [self._choice(None, None, reason)] if reason else []
        return begins + due + ends

    def _new(self, num_tokens: int) -> list[Json]:
        """What the tokens up to so many come to beyond what was sent."""
        if self.is_over:
            piece = self._text.finish(self._growing.finished().text)
        else:
            piece = self._text.grow(self._growing.generated[:num_tokens])
        logprobs = self._logprobs(num_tokens)
        self._num_tokens = num_tokens
        return [self._choice(piece, logprobs, None)] if piece or logprobs else []

    def _beginning(self) -> list[Json]:
        if self._asked.is_chat:
            delta = {"role": "assistant", "content": ""}
            return [{"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}]
        return [self._choice(self._echoed, None, None)] if self._asked.echo else []

    def _choice(self, text: str | None, logprobs: Json | None, reason: str | None) -> Json:
        said: Json = {"text": text or ""}
        if self._asked.is_chat:
            said = {"delta": {} if text is None else {"content": text}}
        return {"index": self.index, **said, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, num_tokens: int) -> Json | None:
        entries = self._growing.logprobs[self._num_tokens : num_tokens]
        if self._growing.request.logprobs is None or not entries:
            return None
        return self._writer.chat(entries) if self._asked.is_chat else self._writer.completion(entries)


async def events_of(ask: Ask, asked: Asked, frame: Json) -> AsyncIterator[Json]:
    """The events of an ask until all is done; `frame` is what every event has.

    Where usage is wanted, it stands in an event of its own at the end, and all others have none.
    """
    assert ask.grown is not None
    usage: Json = {"usage": None} if asked.includes_usage else {}
    choices: list[_Choice] = []
    for one, request in zip(asked.requests, ask.requests, strict=True):
        choices += [
            _Choice(len(choices) + at, one, growing, cuts=asked.cuts) for at, growing in enumerate(request)
        ]
    while not all(choice.is_over for choice in choices):
        if ask.done.done():
            ask.done.result()  # raises what went wrong
        else:
            await ask.grown.wait()
            ask.grown.clear()
        for choice in choices:
            for event in choice.events():
                yield frame | {"choices": [event]} | usage
    if asked.includes_usage:
        num_prompt = sum(len(request[0].prompt) for request in ask.requests)
        num_new = 0 if asked.cuts else sum(len(growing.generated) for growing in ask.sequences)
        counts = {"prompt_tokens": num_prompt, "completion_tokens": num_new}
        yield frame | {"choices": [], "usage": counts | {"total_tokens": num_prompt + num_new}}


class EventReply(Response):
    """Sends events as they come; `on_end` is called however it ends, also when the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, http: HttpRequest, events: AsyncIterator[Json], on_end: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._http, self._events, self._on_end = http, events, on_end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        telling = asyncio.create_task(self._tell(send))
        leaving = asyncio.create_task(until_gone(self._http))
        try:
            await asyncio.wait((telling, leaving), return_when=asyncio.FIRST_COMPLETED)
            if telling.done():
                telling.result()
        finally:
            self._on_end()
            for task in (telling, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, OSError):
                    await task

    async def _tell(self, send: Any) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        try:
            async for event in self._events:
                await self._say(send, encoded(event))
        except CrewGone as error:
            await self._say(send, encoded(error_body(500, str(error))))
        await self._say(send, b"[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _say(self, send: Any, data: bytes) -> None:
        await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})


async def until_gone(http: HttpRequest) -> None:
    """Wait until the client has closed its connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
