"""Streams: answers as server-sent events, while they grow."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from capstan.generation.batch.answers import Json, chat_logprobs, text_logprobs
from capstan.generation.batch.lines import BatchRequest
from capstan.generation.model import Model
from capstan.generation.runtime.sequences import Sequence as Growing
from capstan.generation.serving.bodies import Asked
from capstan.generation.serving.crew import Ask, CrewGone
from capstan.generation.serving.replies import encoded, error_body

# Bytes that are no whole letter yet are decoded to this.
_UNFINISHED = "\ufffd"


class TextSoFar:
    """The text of a sequence as its tokens come, in pieces that are final.

    Held back are letters whose last bytes have not come, and what may become a stop text. All pieces together
    are the answer's text.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str]) -> None:
        self._decode, self._stop = decode, stop
        self._start = self._end = 0  # tokens whose text is known: decoded again, since spaces depend on them
        self._text, self._num_sent = "", 0

    def grow(self, tokens: Sequence[int]) -> str:
        """The next piece, with all tokens so far."""
        known = self._decode(list(tokens[self._start : self._end]))
        longer = self._decode(list(tokens[self._start :]))
        if len(longer) > len(known) and not longer.endswith(_UNFINISHED):
            self._text += longer[len(known) :]
            self._start, self._end = self._end, len(tokens)
        return self._send(self._text[: len(self._text) - self._held_back()])

    def finish(self, text: str) -> str:
        """The last piece; `text` is the answer's."""
        return self._send(text)

    def _send(self, text: str) -> str:
        piece, self._num_sent = text[self._num_sent :], max(self._num_sent, len(text))
        return piece

    def _held_back(self) -> int:
        """How many letters at the end may be the beginning of a stop text."""
        longest = max(map(len, self._stop), default=1) - 1
        for count in range(min(longest, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-count:]) for stop in self._stop):
                return count
        return 0


class _Choice:
    """One answer on its way: what of it has been sent."""

    def __init__(self, index: int, asked: BatchRequest, growing: Growing, model: Model) -> None:
        self.index, self._asked, self._growing, self._model = index, asked, growing, model
        self._text = TextSoFar(self._decode, growing.request.stop)
        self._num_tokens, self._offset, self._has_begun = 0, 0, False
        self.is_over = False

    def events(self) -> list[Json]:
        """Choices of the events that are due."""
        if self.is_over:
            return []
        # In this order: the engine's thread appends the last token before it says that all is over.
        reason, num_tokens = self._growing.finish_reason, len(self._growing.generated)
        if num_tokens == self._num_tokens and reason is None:
            return []
        begins = [] if self._has_begun else self._beginning()
        self._has_begun = True
        self.is_over = reason is not None
        tokens = self._growing.generated[:num_tokens]
        piece = self._text.finish(self._growing.finished().text) if reason else self._text.grow(tokens)
        logprobs = self._logprobs(num_tokens)
        self._num_tokens = num_tokens
        due = [self._choice(piece, logprobs, None)] if piece or logprobs else []
        ends = [self._choice(None, None, reason)] if reason else []
        return begins + due + ends

    def _beginning(self) -> list[Json]:
        if self._asked.is_chat:
            delta = {"role": "assistant", "content": ""}
            return [{"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}]
        return [self._choice(self._decode(self._growing.prompt), None, None)] if self._asked.echo else []

    def _choice(self, text: str | None, logprobs: Json | None, reason: str | None) -> Json:
        said: Json = {"text": text or ""}
        if self._asked.is_chat:
            said = {"delta": {} if text is None else {"content": text}}
        return {"index": self.index, **said, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, num_tokens: int) -> Json | None:
        if self._growing.request.logprobs is None:
            return None
        entries = self._growing.logprobs[self._num_tokens : num_tokens]
        if self._asked.is_chat:
            return chat_logprobs(entries, self._model) if entries else None
        listed = text_logprobs(entries, self._model, offset=self._offset)
        self._offset += sum(map(len, listed["tokens"]))
        return listed if entries else None

    def _decode(self, tokens: list[int]) -> str:
        tokenizer = self._model.tokenizer
        return "" if tokenizer is None else str(tokenizer.decode(tokens, skip_special_tokens=True))


async def events_of(ask: Ask, asked: Asked, model: Model, frame: Json) -> AsyncIterator[Json]:
    """The events of an ask until all is done; `frame` is what every event has."""
    assert ask.grown is not None
    choices: list[_Choice] = []
    for one, request in zip(asked.requests, ask.requests, strict=True):
        choices += [_Choice(len(choices) + at, one, growing, model) for at, growing in enumerate(request)]
    while not all(choice.is_over for choice in choices):
        if ask.done.done():
            ask.done.result()  # raises what went wrong
        else:
            await ask.grown.wait()
            ask.grown.clear()
        for choice in choices:
            for event in choice.events():
                yield frame | {"choices": [event]}
    if asked.includes_usage:
        num_prompt = sum(len(request[0].prompt) for request in ask.requests)
        num_new = sum(len(growing.generated) for growing in ask.sequences)
        usage = {"prompt_tokens": num_prompt, "completion_tokens": num_new}
        yield frame | {"choices": [], "usage": usage | {"total_tokens": num_prompt + num_new}}


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
