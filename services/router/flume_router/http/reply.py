"""The answer to one HTTP request: a JSON document, or server-sent events.

Once events have begun the status is out, so an error becomes an event (and there is no `[DONE]`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import msgspec
from starlette.types import Send

from flume_router.http.errors import ErrorReply
from flume_router.http.request_state import EVENTS

_JSON = b"application/json"
_EVENTS = b"text/event-stream; charset=utf-8"
_LAST_WORDS_S = 2.0  # for a client that has stopped reading
_encode = msgspec.json.Encoder().encode


class Reply:
    def __init__(self, send: Send, state: dict[str, Any]) -> None:
        """`state`: of the request, where its connection reads whether the answer is events."""
        self._send = send
        self._state = state
        self.streaming = False
        self.ended = False

    async def json(
        self, document: object, *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        data = _encode(document)
        await self._start(status, _JSON, {"content-length": str(len(data)), **(headers or {})})
        await self._end(data)

    async def start_events(self) -> None:
        # Proxies must pass events on as they come; nginx reads the second header.
        await self._start(200, _EVENTS, {"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.streaming = True
        self._state[EVENTS] = True

    async def event(self, document: object) -> None:
        """One event; JSON has no line breaks, so it is one line."""
        await self._data(_encode(document))

    async def end_events(self) -> None:
        """`[DONE]`: the answer is whole."""
        await self._data(b"[DONE]")
        await self._end()

    async def error(self, error: ErrorReply) -> None:
        """As the whole answer, or as the last event."""
        if not self.streaming:
            await self.json(error.body, status=error.status, headers=error.headers)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await self.event(error.body)
                await self._end()

    async def _start(self, status: int, content_type: bytes, headers: Mapping[str, str]) -> None:
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", content_type), *raw],
            }
        )

    async def _data(self, data: bytes) -> None:
        await self._send(
            {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True}
        )

    async def _end(self, data: bytes = b"") -> None:
        self.ended = True
        await self._send({"type": "http.response.body", "body": data, "more_body": False})
