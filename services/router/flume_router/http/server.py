"""Lifetime of the HTTP server: uvicorn on a socket of ours, without its signals and its logs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from flume_common.serving import CannotListen
from flume_common.tasks import background
from starlette.types import ASGIApp

_KEEP_ALIVE_S = 75  # longer than clients keep an idle connection, so that they never meet a closed one
_CLOSE_S = 3  # for connections that are still writing when requests are already over


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()
        self.ended = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().serve(sockets)
        finally:
            self.ended.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's business (`serve.py`)."""
        yield


def bind(address: str) -> socket.socket:
    """Listen on `host:port`. Raises CannotListen with the system's reason."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, int(port)), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CannotListen(address, reason or str(error)) from error


def reachable_address(address: str, bound: socket.socket) -> str:
    """host:port for others; a wildcard becomes this machine's name."""
    host = address.rpartition(":")[0]
    if host in ("", "0.0.0.0", "[::]"):
        host = socket.gethostname()
    return f"{host}:{bound.getsockname()[1]}"


@contextlib.asynccontextmanager
async def http_server(app: ASGIApp, bound: socket.socket) -> AsyncIterator[None]:
    """Serves while the body runs; then takes no connection more and closes those there are."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_CLOSE_S,
    )
    server = _Server(config)
    async with background(http=server.serve(sockets=[bound])):
        await server.up.wait()
        try:
            yield
        finally:
            server.should_exit = True
            await server.ended.wait()
