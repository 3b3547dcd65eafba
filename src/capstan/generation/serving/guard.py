"""What stands before every route: who may ask, how much they may send, and how long they may take.

A server without a token trusts whoever is on this machine. A web page from elsewhere is not: it cannot send
JSON to a strange server unasked, and where it made its own name point here, that name is not among `hosts`.
"""

import asyncio
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from capstan.generation.serving.limits import Limits
from capstan.generation.serving.replies import Refused, refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

UPLOADS = "/v1/files"
_OPEN_TO_ALL = "/health"


class Guard:
    """ASGI middleware: 401 without the token, 403 for a strange host, 413 for a body that is too large, 408
    for one that does not come."""

    def __init__(self, app: Any, *, token: str | None, hosts: frozenset[str] | None, limits: Limits) -> None:
        self._app, self._hosts, self._limits = app, hosts, limits
        self._token = None if token is None else _digest(token.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        is_upload = scope["path"] == UPLOADS and scope["method"] == "POST"
        limit = self._limits.file_bytes + 64_000 if is_upload else self._limits.body_bytes
        try:
            self._require_host(headers.get(b"host", b""))
            if scope["path"] != _OPEN_TO_ALL:
                self._require_token(headers.get(b"authorization", b""))
            stated = headers.get(b"content-length", b"0")
            if not stated.isdigit() or int(stated) > limit:
                raise too_large(limit)
        except Refused as refused:
            await refusal(refused)(scope, receive, send)
            return
        body_s = self._limits.body_s * (10 if is_upload else 1)
        await self._app(scope, _bounded(receive, limit, body_s), send)

    def _require_host(self, host: bytes) -> None:
        name = re.sub(r":[0-9]*$", "", host.decode("latin-1")).strip("[]").lower()
        if self._hosts is not None and name not in self._hosts:
            known = " or ".join(sorted(self._hosts))
            raise Refused(403, f"Without a token this server is only for {known}, not for {name!r}.")

    def _require_token(self, authorization: bytes) -> None:
        if self._token is None:
            return
        scheme, _, given = authorization.partition(b" ")
        # Digests, so that neither the length nor the first differing byte can be learned from the time.
        if scheme.lower() != b"bearer" or not hmac.compare_digest(_digest(given.strip()), self._token):
            raise Refused(
                401,
                "This server wants its token, as 'Authorization: Bearer TOKEN'; the one given is not it.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def too_large(limit: int) -> Refused:
    """The refusal of a body of more than `limit` bytes."""
    return Refused(413, f"The request is larger than {limit:,} bytes; send less at once.", code="too_large")


def _bounded(receive: Receive, limit: int, body_s: float) -> Receive:
    """Receive a body within bounds; afterwards only whether the client is still there is waited for."""
    due_s = asyncio.get_running_loop().time() + body_s
    num_bytes, is_complete = 0, False

    async def bounded() -> MutableMapping[str, Any]:
        nonlocal num_bytes, is_complete
        if is_complete:
            return await receive()
        try:
            async with asyncio.timeout_at(due_s):
                message = await receive()
        except TimeoutError:
            raise Refused(408, f"The request's body did not come within {body_s:.0f} s.") from None
        num_bytes += len(message.get("body", b""))
        is_complete = not message.get("more_body", False)
        if num_bytes > limit:
            raise too_large(limit)
        return message

    return bounded
