"""What surrounds every HTTP request: its id, and one line in the log."""

from __future__ import annotations

import re
import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = structlog.get_logger(__name__)

_ACCEPTED_ID = re.compile(r"[\x21-\x7e]{1,128}")
_QUIET = frozenset({"/health", "/healthz", "/livez", "/readyz", "/live"})


class RequestContext:
    """ASGI middleware: takes or makes `x-request-id`, returns it, and puts it into every log line."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(Headers(scope=scope).get("x-request-id"))
        status = 0
        began_s = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await self._app(scope, receive, send_with_id)
            _log(scope, status, time.monotonic() - began_s)


def request_id_of(given: str | None) -> str:
    """The client's own where it is printable and not long; else a new one."""
    if given is not None and _ACCEPTED_ID.fullmatch(given):
        return given
    return f"req_{uuid.uuid4().hex}"


def _log(scope: Scope, status: int, elapsed_s: float) -> None:
    write = log.debug if scope["path"] in _QUIET else log.info
    write(
        "http_request",
        method=scope["method"],
        path=scope["path"],
        status=status,
        elapsed_ms=round(elapsed_s * 1000, 1),
    )
