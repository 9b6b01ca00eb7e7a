"""Errors as OpenAI's API writes them: {"error": {"message", "type", "param", "code"}} and a status.

We add the request id, as the last event of a stream may be far from the header that has it.

* HttpError     what goes wrong before there is a request for the router: path, method, size, JSON
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import structlog

from flume_router.errors import (
    BadRequest,
    DeadlineExceeded,
    InternalError,
    ModelNotFound,
    ReaderFailed,
    RouterError,
    SequenceFailed,
    Unavailable,
    WeightNodeFailed,
)

INVALID_REQUEST, SERVER_ERROR, TIMEOUT = "invalid_request_error", "server_error", "timeout"


class HttpError(Exception):
    """Carries its own status and headers."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})


class ErrorReply(msgspec.Struct, frozen=True):
    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str]


# The first entry an error is an instance of counts. Headers: the official client retries 5xx by
# itself unless told not to; after a deadline it would double the load, and what failed inside fails again.
_STATUS_OF: Mapping[type[RouterError], tuple[int, str, Mapping[str, str]]] = {
    BadRequest: (400, INVALID_REQUEST, {}),
    ModelNotFound: (404, INVALID_REQUEST, {}),
    Unavailable: (503, SERVER_ERROR, {}),
    DeadlineExceeded: (504, TIMEOUT, {"x-should-retry": "false"}),
    InternalError: (500, SERVER_ERROR, {"x-should-retry": "false"}),
    SequenceFailed: (500, SERVER_ERROR, {"x-should-retry": "false"}),
    WeightNodeFailed: (500, SERVER_ERROR, {}),
    ReaderFailed: (500, SERVER_ERROR, {"x-should-retry": "false"}),
}


def reply_of(error: RouterError | HttpError) -> ErrorReply:
    """Status, body and headers for an error."""
    if isinstance(error, HttpError):
        return ErrorReply(error.status, body(str(error), INVALID_REQUEST, None, error.code), error.headers)
    status, kind, headers = next(entry for cls, entry in _STATUS_OF.items() if isinstance(error, cls))
    if isinstance(error, Unavailable):
        headers = {"retry-after": str(error.retry_after_s)}
    return ErrorReply(status, body(error.message, kind, error.param, error.code), headers)


def unexpected() -> ErrorReply:
    """For a defect of ours: the client learns nothing but that it was one."""
    return ErrorReply(
        500, body("The server had an internal error.", SERVER_ERROR, None, "internal_error"), {}
    )


def body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    return {
        "error": {"message": message, "type": kind, "param": param, "code": code, "request_id": request_id}
    }
