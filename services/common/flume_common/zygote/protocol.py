"""What is said on a zygote's socket, and how such a socket is named. Linux only.

Sockets are of type SEQPACKET, so that a message is a packet, and live in the abstract namespace: no
file is left behind and no path is too long. Any user could connect there, so both ends look who it is.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
from pathlib import Path

import msgspec

_UCRED = struct.Struct("3i")
_BACKLOG = 128
MAX_PACKET_BYTES = 1 << 20
MAX_FDS = 16


class Fork(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Run `module.main()` in a child. With it come the child's standard output and error, and more.

    `fd_flags` names the flag for each further descriptor: its number in the child follows it, before
    `args`. `group` is the process group to join, 0 for one of its own. A `tied` child is killed some
    time after whoever asked for it is gone; others run on.
    """

    module: str
    args: list[str]
    env: dict[str, str]
    fd_flags: list[str] = []
    group: int = 0
    tied: bool = False


class Forked(msgspec.Struct, frozen=True, tag=True):
    """With it comes a pidfd."""

    pid: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    reason: str


class Ended(msgspec.Struct, frozen=True, tag=True):
    """The last word on a child; a negative code is the signal it died of."""

    exit_code: int


Answer = Forked | Refused | Ended


def abstract_name(kind: str, directory: Path) -> str:
    """The name of a socket that belongs to what is kept in `directory`: the same one every time."""
    digest = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:24]
    return f"flume-{kind}-{os.getuid()}-{digest}"


def bind(name: str) -> socket.socket:
    """A listening socket. Requests wait in it until somebody accepts. Raises OSError when it is taken."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(f"\0{name}")
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def is_ours(connection: socket.socket) -> bool:
    """Whether the other end runs under our user."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(data)
    return bool(uid == os.getuid())
