"""Why requests and connections were refused, counted for metrics."""

from __future__ import annotations

from collections import Counter

from flume_router.errors import BadRequest, Overloaded, RouterError
from flume_router.http.errors import HttpError

REASONS = (
    "bad_request",
    "body_memory",
    "body_timeout",
    "connections",
    "descriptors",
    "header_timeout",
    "malformed",
    "media_type",
    "queue",
    "too_large",
    "too_long",
    "write_timeout",
)
_OF_STATUS = {408: "body_timeout", 413: "too_large", 415: "media_type"}
_TOO_LONG = frozenset({"context_length_exceeded", "array_above_max_length"})


class Refusals:
    """Counts by reason, of one router."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(REASONS, 0))

    def count(self, reason: str) -> None:
        self.counts[reason] += 1

    def count_error(self, error: RouterError | HttpError) -> None:
        """Errors that are no refusal (a node that failed) are not counted."""
        reason = reason_of(error)
        if reason is not None:
            self.count(reason)


def reason_of(error: RouterError | HttpError) -> str | None:
    """One of REASONS, if the client was refused rather than failed."""
    match error:
        case Overloaded():
            return error.reason
        case HttpError():
            return _OF_STATUS.get(error.status, "bad_request")
        case BadRequest():
            return "too_long" if error.code in _TOO_LONG else "bad_request"
        case _:
            return None
