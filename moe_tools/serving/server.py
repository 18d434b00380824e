"""Runs an application: uvicorn in a thread, signals in the main one.

uvicorn by itself dies of the signal that stopped it. A server that was asked to end and did is no
failure: it ends with 0 here.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

_log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
BACKLOG = 256
"""Connections that the kernel holds while none is taken."""
IDLE = 65
"""Seconds that a connection without a request stays: above the 60 of usual proxies."""
LOOK = 0.2
"""Seconds between two looks whether the server has ended."""


def bind(host: str, port: int) -> socket.socket:
    """Takes an address; nobody can connect before the server runs.

    Raises:
        ValueError: it is taken, not one of this machine, or not allowed.
    """
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port {port} is no port: 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        held = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host} is no address of this machine: {error}") from error
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(address)
    except OSError as error:
        held.close()
        raise _taken(host, port, error) from error
    return held


def _taken(host: str, port: int, error: OSError) -> ValueError:
    return ValueError(f"{host}:{port} cannot be taken ({error.strerror}): choose another --port")


class Server:
    """uvicorn with an application, in a thread.

    Args:
        make: makes the application, in the event loop.
        held: where to listen.
        connections: at most; more are answered with 503.
        grace: seconds for requests that run when the server is asked to end.
    """

    def __init__(
        self, make: Callable[[], ASGIApp], held: socket.socket, *, connections: int, grace: float
    ) -> None:
        self._config = uvicorn.Config(
            "moe-tools",
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            limit_concurrency=connections,
            timeout_keep_alive=IDLE,
            timeout_graceful_shutdown=max(1, round(grace)),
        )
        self._make, self._held = make, held
        self._uvicorn = uvicorn.Server(self._config)
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="serve", daemon=True)
        host, port = held.getsockname()[:2]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def start(self) -> None:
        """Begins, and waits until it serves.

        Raises:
            ValueError: the address is taken by now.
            RuntimeError: it failed.
        """
        try:
            self._held.listen(BACKLOG)
        except OSError as error:  # another program was faster
            host, port = self._held.getsockname()[:2]
            raise _taken(host, port, error) from error
        self._thread.start()
        while not self._uvicorn.started and self._thread.is_alive():
            self._thread.join(LOOK)
        self._check()

    def end(self) -> None:
        """Takes no more requests, and lets those finish that run; the second call ends them."""
        self._uvicorn.force_exit = self._uvicorn.should_exit
        self._uvicorn.should_exit = True

    def join(self) -> None:
        """Waits until it has ended.

        Raises:
            RuntimeError: it failed by itself.
        """
        while self._thread.is_alive():
            self._thread.join(LOOK)  # a wait without end would hear no signal
        self._check()

    def _work(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # told by whoever waits
            self._failed = error

    async def _serve(self) -> None:
        self._config.app = self._make()
        await self._uvicorn.serve(sockets=[self._held])

    def _check(self) -> None:
        if self._failed is not None:
            raise RuntimeError("the server failed") from self._failed


@contextmanager
def ended_by_signals(server: Server) -> Iterator[None]:
    """While it lasts, SIGINT or SIGTERM ends a server, and the second one at once."""
    heard: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        if not heard:
            _log.info("%s: requests that run may finish", signal.Signals(number).name)
        heard.append(number)
        server.end()

    before = {one: signal.signal(one, end) for one in SIGNALS}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
