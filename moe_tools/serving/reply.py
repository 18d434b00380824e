"""Answers one order: in one piece, or streamed as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from moe_tools.serving.engine import Engine
from moe_tools.serving.forms import Answer
from moe_tools.serving.limits import Turns
from moe_tools.serving.metrics import Metrics
from moe_tools.serving.order import End, Order
from moe_tools.serving.refusal import Refusal
from moe_tools.serving.sparsity import Watch
from moe_tools.serving.text import Writer

DONE = b"data: [DONE]\n\n"
"""The last event of every stream."""
GONE = 499
"""The status that is counted for a client that left; it is sent to nobody."""


@dataclass(frozen=True)
class Kitchen:
    """What all replies of a server share."""

    engine: Engine
    turns: Turns
    metrics: Metrics
    watch: Watch


class Reply(Response):
    """Waits for its turn, has the order computed and sends the answer.

    A client that leaves ends the work, wherever it is.
    """

    def __init__(
        self,
        kitchen: Kitchen,
        order: Order,
        writer: Writer,
        answer: Answer,
        stream: bool,
        figures: bool,
    ) -> None:
        self._kitchen, self._order, self._writer = kitchen, order, writer
        self._answer, self._stream, self._figures = answer, stream, figures
        self._tokens = 0
        self._reason = "length"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI.

        Raises:
            Refusal: too many wait, or the model failed before anything was sent.
        """
        work = asyncio.ensure_future(self._work(scope, receive, send))
        leaves = asyncio.ensure_future(_leaves(receive))
        status = GONE
        try:
            await asyncio.wait({work, leaves}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                status = 500
                work.result()
                status = 200
        except Refusal as refusal:
            status = refusal.status
            raise
        finally:
            for task in (work, leaves):
                task.cancel()
            await asyncio.gather(work, leaves, return_exceptions=True)
            self._kitchen.metrics.answered(self._answer.kind, status)

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._kitchen.turns.turn():
            if self._stream:
                async with aclosing(self._pieces()) as pieces:
                    await self._send_stream(send, pieces)
            else:
                async with aclosing(self._pieces()) as pieces:
                    text = "".join([piece async for piece in pieces])
                whole = self._answer.whole(text, self._reason, self._usage())
                await JSONResponse(whole)(scope, receive, send)

    async def _send_stream(self, send: Send, pieces: AsyncGenerator[str]) -> None:
        first = await anext(pieces, None)  # an error before it is still one of HTTP
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def event(data: dict[str, Any]) -> None:
            line = f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
            body = line.encode("utf-8", "replace")
            await send({"type": "http.response.body", "body": body, "more_body": True})

        if self._answer.has_first:
            await event(self._answer.part(None))
        try:
            if first:
                await event(self._answer.part(first))
            async for piece in pieces:
                await event(self._answer.part(piece))
            await event(self._answer.part(None, self._reason))
            if self._figures:
                await event(self._answer.figures(self._usage()))
        except Refusal as refusal:  # too late for a status
            await event(refusal.body())
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _pieces(self) -> AsyncGenerator[str]:
        """The text as it comes.

        Raises:
            Refusal: the model failed.
        """
        writer = self._writer
        async with _computed(self._kitchen, self._order):
            while not isinstance(token := await self._order.heard.get(), End):
                self._count()
                if token in self._order.ends:
                    self._reason = "stop"
                elif not writer.stopped and (piece := writer.add(token)):
                    yield piece
                if writer.stopped:
                    self._reason = "stop"
                    self._kitchen.engine.cancel(self._order)
            if token.error is not None:
                raise Refusal(
                    503 if not self._kitchen.engine.alive else 500, f"it failed: {token.error}"
                )
            if piece := writer.rest():
                yield piece
            if writer.stopped:
                self._reason = "stop"

    def _count(self) -> None:
        if not self._tokens:
            self._kitchen.metrics.first(time.perf_counter() - self._order.came)
        self._tokens += 1
        self._kitchen.metrics.token()

    def _usage(self) -> dict[str, Any]:
        """Tokens, and how sparse it was where that was counted."""
        order, prompt = self._order, len(self._order.prompt)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": self._tokens,
            "total_tokens": prompt + self._tokens,
        }
        share = order.counted.sparsity
        if share is None:
            return {"usage": usage}
        passes = "all" if self._kitchen.watch.is_whole else "a sample"
        figures = {
            "ffn_sparsity": round(share, 4),
            "of": "this request" if order.alone else "its batch",
            "passes": passes,
        }
        return {"usage": usage, "moe_tools": figures}


@asynccontextmanager
async def _computed(kitchen: Kitchen, order: Order) -> AsyncIterator[None]:
    """While it lasts, an order is computed; what is left of it then is given up."""
    kitchen.metrics.began(len(order.prompt))
    kitchen.engine.submit(order)
    try:
        yield
    finally:
        kitchen.engine.cancel(order)
        kitchen.metrics.ended(time.perf_counter() - order.came, order.counted, order.alone)


async def _leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
