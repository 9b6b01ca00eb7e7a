"""What a connection beyond the limit gets: an answer to a probe, or 503."""

from __future__ import annotations

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from flume_router.errors import Overloaded
from flume_router.http.door import Door
from flume_router.http.errors import reply_of

_PROBES = frozenset({"/livez", "/live", "/healthz", "/readyz", "/health", "/metrics"})


class Busy:
    """An ASGI application before another one."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in _PROBES:
            await self._app(scope, receive, send)
            return
        self._door.refusals.count("connections")
        number = self._door.limits.max_connections
        reply = reply_of(Overloaded("connections", f"this router has its {number} connections already"))
        response = Response(
            msgspec.json.encode(reply.body),
            reply.status,
            {**reply.headers, "connection": "close"},
            media_type="application/json",
        )
        await response(scope, receive, send)
