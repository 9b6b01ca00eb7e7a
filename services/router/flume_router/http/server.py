"""Lifetime of the HTTP server: uvicorn on a socket of ours, without its signals, logs and accept loop."""

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

from flume_router.http.accept import accept
from flume_router.http.busy import Busy
from flume_router.http.connection import Connection
from flume_router.http.door import Door

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
        """Unlike uvicorn's, it does not accept: `accept.py` does."""
        await self.lifespan.startup()
        self.servers = []
        self.started = True
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
async def http_server(app: ASGIApp, bound: socket.socket, door: Door) -> AsyncIterator[None]:
    """Serves while the body runs; then takes no connection more and closes those there are."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(door.limits.idle_timeout_s) + 1,  # ours is looked at first
        timeout_graceful_shutdown=_CLOSE_S,
    )
    # It tells what we tell or count ourselves; a client must not be able to fill the log.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    server = _Server(config)
    busy = Busy(app, door)
    async with background(http=server.serve(), sweep=door.sweep()):
        await server.up.wait()
        try:
            async with background(
                accept=accept(bound, door, lambda: Connection(config, server.server_state, door, busy))
            ):
                yield
        finally:
            bound.close()
            server.leave()
            await server.ended.wait()
