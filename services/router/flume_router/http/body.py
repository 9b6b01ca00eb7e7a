"""Reads a JSON request body within limits. Raises HttpError: 413, 415, or 400 for what is no JSON object."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import msgspec
from starlette.requests import Request

from flume_router.http.errors import HttpError

_MOST_DISCARDED_BYTES = 64 << 20
_MOST_DISCARDED_S = 10.0
_NOT_JSON = (
    "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP "
    "library correctly. This API expects a JSON payload, but what was sent was not valid JSON.)"
)


async def read_object(request: Request, limit_bytes: int) -> dict[str, Any]:
    """The body as an object."""
    _check_content_type(request.headers.get("content-type"))
    data = await _read(request, limit_bytes)
    try:
        value = msgspec.json.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise HttpError(400, _NOT_JSON) from error
    if not isinstance(value, dict):
        raise HttpError(400, "The JSON body of a request must be an object.")
    return value


def _check_content_type(content_type: str | None) -> None:
    kind = (content_type or "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpError(
            415,
            f"Unsupported content type '{kind[:64]}'; send application/json.",
            code="unsupported_content_type",
        )


async def _read(request: Request, limit_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    too_large = declared.isdigit() and int(declared) > limit_bytes
    if too_large and request.headers.get("expect", "").lower() == "100-continue":
        raise _too_large(limit_bytes)  # this client waits for our word before it sends anything
    kept = bytearray()
    chunks = request.stream()
    async for chunk in chunks:
        if too_large or len(kept) + len(chunk) > limit_bytes:
            kept.clear()
            await _discard(chunks)
            raise _too_large(limit_bytes)
        kept += chunk
    return bytes(kept)


async def _discard(chunks: AsyncIterator[bytes]) -> None:
    """Most clients look for an answer only after their last byte, so it is read, within reason."""
    discarded_bytes = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_MOST_DISCARDED_S):
            async for chunk in chunks:
                discarded_bytes += len(chunk)
                if discarded_bytes > _MOST_DISCARDED_BYTES:
                    return


def _too_large(limit_bytes: int) -> HttpError:
    return HttpError(
        413,
        f"The request body is larger than the {limit_bytes} bytes allowed.",
        code="request_too_large",
        headers={"connection": "close"},
    )
