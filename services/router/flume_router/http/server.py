"""Lifetime of the HTTP server: uvicorn on a socket of ours, without its signals and its logs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from flume_common.tasks import background
from starlette.types import ASGIApp

_KEEP_ALIVE_S = 75  # longer than clients keep an idle connection, so that they never meet a closed one
_TICK_S = 0.1  # uvicorn counts ten of them as a second
_CLOSE_S = 3  # for connections that are still writing when requests are already over


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()
        self.ended = asyncio.Event()
        self._leaving = asyncio.Event()

    def leave(self) -> None:
        self.should_exit = True
        self._leaving.set()

    async def main_loop(self) -> None:
        """As uvicorn's, which updates the `date` header; but an end is seen at once, not at the next tick."""
        for tick in itertools.count():
            if await self.on_tick(tick):
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), _TICK_S)

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
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # it tells what we tell ourselves
    server = _Server(config)
    async with background(http=server.serve(sockets=[bound])):
        await server.up.wait()
        try:
            yield
        finally:
            server.leave()
            await server.ended.wait()
