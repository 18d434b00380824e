"""What keeps a server from too much: of a body, of requests at once, of those who may ask."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_tools.serving.refusal import Refusal

OPEN = ("/health",)
"""Paths that need no key."""
DRAINED, DRAIN_SECONDS = 64 << 20, 5.0
"""How much of a body that is too large is read and thrown away: a client that is cut off while it
sends does not read why."""


class Key:
    """Lets those pass that know the key."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app, self._key = app, None if key is None else key.strip().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or self._key is None or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        word, _, said = Headers(scope=scope).get("authorization", "").partition(" ")
        # the comparison takes as long for a key that begins right
        # headers are bytes, which ASGI hands on as latin-1
        known = hmac.compare_digest(said.strip().encode("latin-1", "replace"), self._key)
        if word.lower() == "bearer" and known:
            await self._app(scope, receive, send)
            return
        wrong = "the API key is wrong" if said else "an API key is needed"
        refusal = Refusal(401, f"{wrong}: send `Authorization: Bearer KEY`", code="invalid_api_key")
        await refusal.response()(scope, receive, send)


class Body:
    """Lets bodies pass that are not too large."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = Headers(scope=scope).get("content-length", "0")
        if said.isdigit() and int(said) > self._most:
            await _drain(receive)
            await self._refusal(f"{int(said)} bytes").response()(scope, receive, send)
            return
        came = 0

        async def counted() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > self._most:
                await _drain(receive)
                raise self._refusal(f"more than {self._most} bytes")
            return message

        await self._app(scope, counted, send)

    def _refusal(self, size: str) -> Refusal:
        return Refusal(
            413,
            f"the body has {size}, and {self._most} are allowed: send less, or start the server "
            "with a larger --max-body",
        )


async def _drain(receive: Receive) -> None:
    came = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while came < DRAINED:
                message = await receive()
                came += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return


class Turns:
    """So many requests run at once, so many wait for their turn in the order they came."""

    def __init__(self, running: int, waiting: int) -> None:
        self.most_running, self.most_waiting = running, waiting
        self.running = self.waiting = 0
        self._free = asyncio.Semaphore(running)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """While it lasts, one of those that run.

        Raises:
            Refusal: too many wait.
        """
        if self._free.locked() and self.waiting >= self.most_waiting:
            raise Refusal(
                429,
                f"{self.running} requests run and {self.waiting} wait: try again later",
                code="rate_limit_exceeded",
            )
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._free.release()
