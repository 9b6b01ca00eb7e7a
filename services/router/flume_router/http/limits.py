"""What a client may use of the HTTP door: sizes, times and connections."""

from __future__ import annotations

import resource

import msgspec

OVERFLOW_CONNECTIONS = 32
"""Beyond the limit: they are told so, and probes among them are answered."""

_MOST_CONNECTIONS = 4096
_RESERVED_DESCRIPTORS = 64  # for gRPC, etcd, logs and processes that read requests
_MOST_DESCRIPTORS = 1 << 20


class HttpLimits(msgspec.Struct, frozen=True, kw_only=True):
    body_bytes: int = 4 << 20
    """Of one request body, compressed or not."""
    header_timeout_s: float = 20.0
    """For a first byte, and for the headers of a request to be complete."""
    body_timeout_s: float = 60.0
    """For a request body to arrive, from its headers on."""
    idle_timeout_s: float = 75.0
    """Between two requests. Longer than clients keep a connection, so that they never meet a closed one."""
    write_timeout_s: float = 60.0
    """For a client to read what fills its connection's buffers."""
    max_connections: int = _MOST_CONNECTIONS


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard one; returns the limit that holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return _MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def connection_limit(descriptors: int, asked: int) -> int:
    """How many connections there may be. `asked`: the operator's limit; 0: as many as are sensible."""
    possible = max(descriptors - _RESERVED_DESCRIPTORS - OVERFLOW_CONNECTIONS, 1)
    return min(asked or _MOST_CONNECTIONS, possible)
