"""Reads a request body within limits of size, time and memory.

Raises HttpError: 408 for one that comes too slowly, 413, 415, or 400 for broken gzip. Overloaded when the
bodies of all requests together take too much memory.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.requests import Request

from flume_router.byte_budget import Held
from flume_router.errors import Overloaded
from flume_router.http.errors import HttpError

_MOST_DISCARDED_BYTES = 64 << 20
_MOST_DISCARDED_S = 10.0
_GZIP = 16 + zlib.MAX_WBITS  # zlib's word for "a gzip header, nothing else"


async def read_body(request: Request, held: Held, *, limit_bytes: int, timeout_s: float) -> bytes:
    """The whole body, decompressed; `limit_bytes` counts for both of its forms."""
    _check_content_type(request.headers.get("content-type"))
    decoder = _decoder(request.headers, limit_bytes)
    chunks = request.stream()
    if _declares_more(request.headers, limit_bytes):
        # A client that says `expect` waits for our word before it sends anything.
        if request.headers.get("expect", "").lower() != "100-continue":
            await _discard(chunks)
        raise _too_large(limit_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            return await _read(chunks, decoder, held, limit_bytes)
    except TimeoutError:  # not the deadline of the whole request, which would be a CancelledError here
        raise HttpError(
            408,
            f"The request body did not arrive within {timeout_s:.0f} s.",
            code="request_timeout",
            headers={"connection": "close"},
        ) from None
    except (HttpError, Overloaded):
        held.release()
        await _discard(chunks)
        raise


async def _read(chunks: AsyncIterator[bytes], decoder: Gunzip | None, held: Held, limit_bytes: int) -> bytes:
    kept: list[bytes] = []
    received = size = 0
    async for chunk in chunks:
        received += len(chunk)
        data = decoder.push(chunk) if decoder else chunk
        size += len(data)
        if max(received, size) > limit_bytes:
            raise _too_large(limit_bytes)
        held.add(len(data))
        kept.append(data)
    if decoder:
        decoder.finish()
    return b"".join(kept)


class Gunzip:
    """Decompresses a gzip stream, never far beyond `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._size = 0
        self._stream = zlib.decompressobj(_GZIP)
        self._begun = False

    def push(self, data: bytes) -> bytes:
        """What the bytes add; at most one byte more than the limit in all. Raises HttpError."""
        parts = []
        while data and self._size <= self._limit_bytes:
            if self._stream.eof:  # another member follows
                self._stream = zlib.decompressobj(_GZIP)
            self._begun = True
            try:
                part = self._stream.decompress(data, self._limit_bytes + 1 - self._size)
            except zlib.error as error:
                raise _broken_gzip(str(error)) from None
            self._size += len(part)
            parts.append(part)
            data = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail
        return b"".join(parts)

    def finish(self) -> None:
        """Raises HttpError when the stream ended too early."""
        if self._begun and not self._stream.eof:
            raise _broken_gzip("it ends too early")


def _broken_gzip(why: str) -> HttpError:
    return HttpError(400, f"The request body is not valid gzip: {why}.", code="invalid_encoding")


def _check_content_type(content_type: str | None) -> None:
    kind = (content_type or "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpError(
            415,
            f"Unsupported content type '{kind[:64]}'; send application/json.",
            code="unsupported_content_type",
        )


def _decoder(headers: Headers, limit_bytes: int) -> Gunzip | None:
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        return None
    if encoding in ("gzip", "x-gzip"):
        return Gunzip(limit_bytes)
    raise HttpError(
        415,
        f"Unsupported content encoding '{encoding[:64]}'; send gzip or none.",
        code="unsupported_content_encoding",
        headers={"accept-encoding": "gzip"},
    )


def _declares_more(headers: Headers, limit_bytes: int) -> bool:
    declared = headers.get("content-length", "")
    return len(declared) > 18 or (declared.isdigit() and int(declared) > limit_bytes)


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
