"""What a client may use of the HTTP door: sizes and times."""

from __future__ import annotations

import msgspec


class HttpLimits(msgspec.Struct, frozen=True, kw_only=True):
    body_bytes: int
    """Of one request body, compressed or not."""
    body_timeout_s: float
    """For a request body to arrive, from its headers on."""
