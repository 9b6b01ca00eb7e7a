"""One HTTP connection: uvicorn's protocol, with limits of time, and refusals in the form of our API.

What uvicorn lacks and is here:

* a first byte, headers, a body, the rest of a refused body and a reader that stops have their time limits;
  one that drips is cut off without a word, a body that is merely slow gets its 408 from who reads it;
* what is no HTTP is refused with JSON and the right status, and the refusal is not lost to a reset;
* a client that shuts down its sending side after its request gets its answer. It looks like one that has
  gone away, so unless the answer comes soon bytes that mean nothing are sent (100 Continue, which all
  clients know, or a comment between events): the kernel of one that has gone answers with a reset.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from enum import Enum
from typing import cast

import h11
import msgspec
from starlette.types import ASGIApp
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from flume_router.http.door import Door
from flume_router.http.errors import INVALID_REQUEST, body
from flume_router.http.request_state import EVENTS

_LINGER_S = 5.0  # to read what still comes after a refusal, as most clients look only then
_OVERFLOW_S = 0.5  # to send a request, for a connection that is one too many
_SLACK_S = 2.0  # for 408 by the application, once a body is over its time
_DRIP_BYTES_PER_S = 100  # a body that comes no faster is an attack, or from a client that hangs
_PROBE_AFTER_S = 0.2  # soon enough to free what a request holds, late enough to be rare
_LOOK_AFTER_S = (0.01, 0.05, 0.15)  # for a reset, after the probe and before the next sweep
_CODES = {431: "headers_too_large", 501: "unsupported_transfer_encoding"}


class Phase(Enum):
    """What is waited for."""

    FIRST_BYTE = "first byte"
    IDLE = "next request"
    HEADERS = "headers"
    BODY = "body"
    ANSWER = "our own answer"
    LINGER = "the rest of what was refused"


_IDLE = (Phase.FIRST_BYTE, Phase.IDLE, Phase.LINGER)
"""Phases in which a connection may be closed for another one."""


class Connection(H11Protocol):
    """Made for each connection that is accepted. `busy` serves those beyond the limit."""

    def __init__(self, config: Config, server_state: ServerState, door: Door, busy: ASGIApp) -> None:
        super().__init__(config, server_state, app_state={})
        self._door = door
        self._busy = busy
        self._limits = door.limits
        self._phase = Phase.FIRST_BYTE
        self._over_at = 0.0  # loop time; 0: never
        self._stalled_at = 0.0  # since when the client does not read; 0: it does
        self._overflow = False
        self._half_closed = False
        self._received_bytes = 0  # in this phase

    # asyncio's protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if not self._door.enter(self):
            self._overflow = True
            self.app = self._busy
        self._enter(Phase.FIRST_BYTE)

    def connection_lost(self, exc: Exception | None) -> None:
        self._door.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._phase is Phase.LINGER and self._refused:
            return
        if self._phase in (Phase.FIRST_BYTE, Phase.IDLE):
            self._enter(Phase.HEADERS)
        self._received_bytes += len(data)
        super().data_received(data)
        self._look()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        if self._phase in (Phase.HEADERS, Phase.BODY):
            super().data_received(b"")  # h11 finds that it is not complete
        if self._phase is not Phase.ANSWER or self.cycle.response_complete:
            return None
        if self.scope["http_version"] != "1.1" and not self.cycle.response_started:
            return None  # it may have gone, and there is nothing to ask it with
        if not self._half_closed:
            self._half_closed = True
            self.loop.call_later(_PROBE_AFTER_S, self._probe)
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled_at = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled_at = 0.0

    # uvicorn's protocol

    def send_400_response(self, msg: str) -> None:
        """Called while h11's error is handled."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._door.refusals.count("malformed")
        self._refuse(status, f"The request is not valid HTTP: {error or msg}.")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._overflow or (self._half_closed and self.cycle.response_complete):
            self.transport.close()
            return
        self._phase = Phase.ANSWER
        self._look()

    # the door's view

    def close_idle(self) -> None:
        self.timeout_keep_alive_handler()

    def check(self, now: float) -> None:
        """Close it if a time limit is over."""
        if self._stalled_at and now - self._stalled_at > self._limits.write_timeout_s:
            self._door.refusals.count("write_timeout")
            self.transport.abort()
        elif self.transport.is_closing():
            self._abort_if_unread(now)
        elif self._half_closed:
            self._abort_if_reset()
        elif self._over_at and now > self._over_at:
            self._expire()

    def _abort_if_unread(self, now: float) -> None:
        """A transport that closes waits for its last bytes to be read."""
        if not self._stalled_at and self.transport.get_write_buffer_size():
            self._stalled_at = now

    def _look(self) -> None:
        """Go to the phase that h11's state says; nothing changes within one."""
        if self.transport.is_closing() or (self._phase is Phase.LINGER and self._refused):
            return
        their_state = self.conn.their_state
        if their_state is h11.SEND_BODY:
            answered = self.conn.our_state is h11.DONE
            self._go(Phase.LINGER if answered else Phase.BODY)
        elif their_state is h11.IDLE:
            self._go(Phase.HEADERS if self.conn.trailing_data[0] else Phase.IDLE)
        else:
            self._go(Phase.ANSWER)

    def _go(self, phase: Phase) -> None:
        if phase is not self._phase:
            self._enter(phase)

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._received_bytes = 0
        # One that is too many has little time, but that it has.
        self._door.set_idle(self, phase in _IDLE and not self._overflow)
        limits = self._limits
        match phase:
            case Phase.FIRST_BYTE | Phase.HEADERS:
                seconds = _OVERFLOW_S if self._overflow else limits.header_timeout_s
            case Phase.IDLE:
                seconds = limits.idle_timeout_s
            case Phase.BODY:
                seconds = limits.body_timeout_s
            case Phase.LINGER:
                seconds = _LINGER_S
            case Phase.ANSWER:
                seconds = 0.0
        self._over_at = self.loop.time() + seconds if seconds else 0.0

    def _expire(self) -> None:
        match self._phase:
            case Phase.FIRST_BYTE | Phase.HEADERS:
                self._door.refusals.count("header_timeout")
                self.transport.close()
            case Phase.BODY if self._received_bytes < self._limits.body_timeout_s * _DRIP_BYTES_PER_S:
                self._door.refusals.count("body_timeout")
                self.transport.abort()
            case Phase.BODY if self._over_at:
                self._over_at += _SLACK_S
                self._received_bytes = 0
            case Phase.IDLE:
                self.close_idle()
            case _:
                self.transport.close()

    @property
    def _refused(self) -> bool:
        """Whether nothing that comes is looked at any more."""
        return self.conn.our_state in (h11.MUST_CLOSE, h11.CLOSED, h11.ERROR)

    def _refuse(self, status: int, message: str) -> None:
        """Answer in place of the application, and close once the client has had time to read that."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its application ends as if the client had gone
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        document = body(message, INVALID_REQUEST, None, _CODES.get(status, "malformed_request"))
        data = msgspec.json.encode(document)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(data)).encode()),
            (b"connection", b"close"),
        ]
        response = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
        for event in (response, h11.Data(data=data), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._enter(Phase.LINGER)
        self.flow.resume_reading()

    # clients that shut down their side

    def _probe(self) -> None:
        """Send what means nothing to a client that is there, unless it has its answer."""
        if self.transport.is_closing() or self.cycle.response_complete:
            return
        if not self.cycle.response_started:
            interim = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            self.transport.write(self.conn.send(interim) or b"")
        elif EVENTS in self.scope["state"]:
            self.transport.write(self.conn.send(h11.Data(data=b":\n\n")) or b"")
        for delay in _LOOK_AFTER_S:
            self.loop.call_later(delay, self._abort_if_reset)

    def _abort_if_reset(self) -> None:
        """Nothing is read any more after the client's end of data, so a reset has to be looked for."""
        if self.transport.is_closing():
            return
        sock = cast(socket.socket, self.transport.get_extra_info("socket"))
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
