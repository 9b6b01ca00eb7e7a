"""gRPC servers and channels with one conduct: health, reflection, keepalive, a graceful end. And signals.

Health names: `""`, every service and `readiness` say whether we take work, `liveness` that we run.
Insecure ports only; encryption between services is not here yet.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from flume_common import reflection
from flume_common.tasks import background

LIVENESS = "liveness"
READINESS = "readiness"
MAX_MESSAGE_BYTES = 32 << 20

_KEEPALIVE: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
_SERVER = (
    *_KEEPALIVE,
    # Otherwise a second process gets the same port without an error, and half of the calls.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)
_CHANNEL = (
    *_KEEPALIVE,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


class CannotListen(Exception):
    """The address is taken, or is not ours."""

    def __init__(self, bind: str, detail: str) -> None:
        super().__init__(f"cannot listen on {bind}: {detail}")
        self.bind = bind


class _Health(health_aio.HealthServicer):  # type: ignore[misc] # grpc_health has no types
    """Watches of health end soon after the server starts to end: they are no work to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self._ending = asyncio.Event()

    async def Watch(self, request: Any, context: Any) -> None:
        async with background(health_watch=super().Watch(request, context)):
            await self._ending.wait()

    async def end_watches(self) -> None:
        # Time for the last word, NOT_SERVING, to be sent.
        await asyncio.sleep(0.1)
        self._ending.set()


class Server:
    """A running gRPC server."""

    def __init__(self, server: grpc.aio.Server, bind: str, port: int) -> None:
        self.grpc = server
        self.port = port
        self.address = f"{_reachable_host(bind)}:{port}"  # what others may dial
        self.ready = False
        self._poked = asyncio.Event()

    def set_ready(self, ready: bool) -> None:
        """Say by the health service whether we take work."""
        self.ready = ready
        self._poked.set()

    async def report_health(self, health: _Health, names: Sequence[str]) -> NoReturn:
        while True:
            self._poked.clear()
            await _set_all(health, names, self.ready)
            await self._poked.wait()


async def _set_all(health: _Health, names: Sequence[str], serving: bool) -> None:
    statuses = health_pb2.HealthCheckResponse
    for name in names:
        await health.set(name, statuses.SERVING if serving else statuses.NOT_SERVING)


def _reachable_host(bind: str) -> str:
    host = bind.rpartition(":")[0]
    return socket.gethostname() if host in ("0.0.0.0", "[::]", "") else host


@asynccontextmanager
async def serve(
    bind: str,
    add: Callable[[grpc.aio.Server], None],
    services: Sequence[str],
    *,
    ready: bool = False,
    grace_s: float = 5.0,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> AsyncIterator[Server]:
    """Serve on `bind` (`host:port`, port 0 takes a free one) while the body runs.

    `add` registers the servicers, `services` are their full names. At the end health turns to
    NOT_SERVING first, then new calls are refused and open ones get `grace_s` to finish.
    Raises CannotListen.
    """
    server = grpc.aio.server(options=_SERVER, interceptors=tuple(interceptors))
    health = _Health()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    add(server)
    reflection.enable(server, (*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name))
    running = Server(server, bind, _listen(server, bind))
    running.ready = ready
    names = ("", READINESS, *services)
    await _set_all(health, names, ready)
    await _set_all(health, (LIVENESS,), True)
    await server.start()
    try:
        async with background(health=running.report_health(health, names)):
            yield running
    finally:
        await _set_all(health, names, False)
        async with background(end_watches=health.end_watches()):
            await server.stop(grace_s)


def _listen(server: grpc.aio.Server, bind: str) -> int:
    try:
        port = server.add_insecure_port(bind)
    except RuntimeError as error:
        raise CannotListen(bind, "the address is in use or not ours") from error
    if port == 0:
        raise CannotListen(bind, "the address is in use or not ours")
    return port


@asynccontextmanager
async def channel(address: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to one of our servers while the body runs. Connects at the first call."""
    async with grpc.aio.insecure_channel(address, options=_CHANNEL) as opened:
        yield opened


@asynccontextmanager
async def status_errors(
    context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    statuses: Mapping[type[Exception], grpc.StatusCode],
) -> AsyncIterator[None]:
    """End the call with the status that `statuses` gives for an error raised in the body.

    The first entry that the error is an instance of counts; other errors pass.
    """
    try:
        yield
    except tuple(statuses) as error:
        code = next(code for kind, code in statuses.items() if isinstance(error, kind))
        await context.abort(code, str(error))


def stop_event() -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets. A second one ends the process at once with 128 + its number."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stopping


async def until_signalled() -> None:
    """Wait for SIGTERM or SIGINT; see `stop_event`, which also serves those who must poll."""
    await stop_event().wait()
