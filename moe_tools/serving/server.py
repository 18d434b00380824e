"""Runs an application until a signal: uvicorn in a thread, signals in the main one.

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


def run(
    make: Callable[[], ASGIApp],
    held: socket.socket,
    *,
    connections: int,
    grace: float,
    ready: Callable[[str], None],
) -> None:
    """Serves until SIGINT or SIGTERM; then no request is taken, and those that run may finish.

    Args:
        make: makes the application, in the event loop.
        held: where to listen; closed at the end.
        connections: at most; more are answered with 503.
        grace: seconds for requests that run when the signal comes; a second signal ends them.
        ready: told the address once it serves.

    Raises:
        ValueError: the address is taken by now.
        RuntimeError: the server failed by itself.
    """
    config = uvicorn.Config(
        "moe-tools",
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        limit_concurrency=connections,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=max(1, round(grace)),
    )
    try:
        held.listen(BACKLOG)
    except OSError as error:  # another program was faster
        host, port = held.getsockname()[:2]
        raise _taken(host, port, error) from error
    server = uvicorn.Server(config)
    failed: list[BaseException] = []

    async def serve() -> None:
        config.app = make()
        await server.serve(sockets=[held])

    def work() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:  # told by the main thread
            failed.append(error)

    thread = threading.Thread(target=work, name="serve", daemon=True)
    with _heard(server):
        thread.start()
        told = False
        while thread.is_alive():
            thread.join(LOOK)
            if server.started and not told:
                told = True
                ready(_address(held))
    if failed:
        raise RuntimeError("the server failed") from failed[0]


@contextmanager
def _heard(server: uvicorn.Server) -> Iterator[None]:
    """While it lasts, a signal ends the server, and the second one at once."""

    def end(number: int, _: FrameType | None) -> None:
        server.force_exit = server.should_exit
        if not server.should_exit:
            _log.info("%s: requests that run may finish", signal.Signals(number).name)
        server.should_exit = True

    before = {one: signal.signal(one, end) for one in SIGNALS}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _address(held: socket.socket) -> str:
    try:
        host, port = held.getsockname()[:2]
    except OSError:  # it was closed meanwhile
        return ""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
