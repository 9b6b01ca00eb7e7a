"""Refuses versions of HTTP that are not spoken here."""

from __future__ import annotations

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from flume_router.http.errors import INVALID_REQUEST, body

_SPOKEN = ("1.0", "1.1")


class HttpVersion:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        version = scope.get("http_version", "1.1")
        if version in _SPOKEN:
            await self._app(scope, receive, send)
            return
        message = f"HTTP {version} is not supported; send HTTP/1.1."
        document = body(message, INVALID_REQUEST, None, "unsupported_http_version")
        data = msgspec.json.encode(document)
        response = Response(data, 505, {"connection": "close"}, media_type="application/json")
        await response(scope, receive, send)
