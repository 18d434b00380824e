"""What a client is told when it does not get what it asked for: a status, and OpenAI's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

KINDS = {401: "authentication_error", 429: "rate_limit_error"}
"""Status -> `type` of the error; others are below."""
AGAIN = "2"
"""Seconds until a client that was sent away may come back."""


class Refusal(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: the value, the rule and the way out.
        param: the field of the request that is wrong, if it is one.
        code: a word for programs.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON that OpenAI's clients read."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": KINDS.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> JSONResponse:
        """The same as an answer of HTTP."""
        headers: Mapping[str, str] = {}
        if self.status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        elif self.status in (429, 503):
            headers = {"Retry-After": AGAIN}
        return JSONResponse(self.body(), self.status, headers)


async def refused(_: Request, error: Exception) -> JSONResponse:
    """Answers a Refusal."""
    assert isinstance(error, Refusal)
    return error.response()
