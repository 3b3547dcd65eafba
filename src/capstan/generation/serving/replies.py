"""Replies: JSON, and errors as OpenAI writes them."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Refused(Exception):
    """A request that is not answered; becomes an error reply."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})


def refusal(refused: Refused) -> Response:
    """The reply to a request that is not answered."""
    return reply(
        error_body(refused.status, refused.message, code=refused.code, param=refused.param),
        refused.status,
        headers=refused.headers,
    )


def error_body(
    status: int, message: str, *, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def reply(body: Any, status: int = 200, *, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON reply."""
    return Response(
        encoded(body), status, media_type="application/json", headers=dict(headers) if headers else None
    )


def encoded(body: Any) -> bytes:
    """JSON; half a surrogate pair, which UTF-8 cannot write, is escaped."""
    try:
        return json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(body).encode()
