"""Addresses of HTTP servers: a socket that listens on `host:port`, and what others dial to reach it."""

from __future__ import annotations

import encodings.idna  # noqa: F401 - what getaddrinfo loads: here, as forks then have it already
import socket

from flume_common.serving import CannotListen

_BACKLOG = 2048


def bind(address: str) -> socket.socket:
    """Listen on `host:port`; port 0 takes a free one. Raises CannotListen with the system's reason."""
    host, _, port = address.rpartition(":")
    try:
        [(family, kind, _, _, where), *_] = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        # The protocol by name: asyncio turns Nagle's algorithm off only where it sees TCP, and with it
        # every small write, thus every token, waits 40 ms for an acknowledgement.
        bound = socket.socket(family, kind, socket.IPPROTO_TCP)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(where)
            bound.listen(_BACKLOG)
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError, ValueError) as error:
        raise CannotListen(address, getattr(error, "strerror", None) or str(error)) from error
    return bound


def reachable_address(address: str, bound: socket.socket, advertise_host: str = "") -> str:
    """host:port for others: `advertise_host` where it is given; a wildcard becomes this machine's name."""
    host = advertise_host or address.rpartition(":")[0]
    if host in ("0.0.0.0", "[::]", ""):
        host = socket.gethostname()
    return f"{host}:{bound.getsockname()[1]}"
