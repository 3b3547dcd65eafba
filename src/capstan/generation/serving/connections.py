"""Connections that cannot be held open for nothing.

uvicorn bounds how long a connection may rest between requests, but not how long one may take to send its
headers or to read what was sent to it. Both are bounded here; bodies are bounded by `Guard`.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from capstan.generation.serving.limits import Limits


def bounded_protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1, in which slow connections are cut off."""

    class Bounded(H11Protocol):
        _headers_due: asyncio.TimerHandle | None = None
        _reading_due: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._headers_due = self.loop.call_later(limits.header_s, self._cut_off)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            is_answering = self.cycle is not None and not self.cycle.response_complete
            if is_answering and self._headers_due is not None:
                self._headers_due.cancel()
                self._headers_due = None
            elif not is_answering and self._headers_due is None:
                # Part of another request, or the rest of a body that was refused.
                self._headers_due = self.loop.call_later(limits.header_s, self._cut_off)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._reading_due = self.loop.call_later(limits.write_s, self._cut_off)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._reading_due is not None:
                self._reading_due.cancel()
                self._reading_due = None

        def connection_lost(self, exc: Exception | None) -> None:
            for due in (self._headers_due, self._reading_due):
                if due is not None:
                    due.cancel()
            super().connection_lost(exc)

        def _cut_off(self) -> None:
            self.transport.abort()

    return Bounded
