"""How the processes of a local cluster are, asked of the `flumectl up` that looks after them.

It answers each connection to a socket in the cluster's private directory with one line of JSON. That needs
neither etcd nor the controller nor room on the disk, as those are what may be amiss.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec

ASK_S = 2.0
_MOST_BYTES = 1 << 20


class ChildView(msgspec.Struct, frozen=True, kw_only=True):
    """One process that is kept running."""

    id: str
    pid: int
    running: bool
    restarts: int = 0
    trouble: str = ""
    """Why it does not run, or ended lately; empty when all is well."""


class SupervisorView(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    children: tuple[ChildView, ...]
    directory: str
    free_bytes: int
    """On the disk of `directory`."""
    disk_full: bool

    @property
    def troubles(self) -> list[str]:
        """What an operator should know, in sentences; [] when all is well."""
        disk = f"the disk of {self.directory} is full ({self.free_bytes >> 10} KiB free): free some space"
        ended = [child.trouble for child in self.children if child.trouble]
        return [*([disk] if self.disk_full else []), *ended]


@asynccontextmanager
async def serve_view(path: Path, view: Callable[[], SupervisorView]) -> AsyncIterator[None]:
    """Answer at `path` while the body runs. Raises OSError."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(msgspec.json.encode(view()) + b"\n")
            await writer.drain()
        except OSError:
            pass  # it does not want to know any more
        finally:
            writer.close()

    remove = partial(path.unlink, missing_ok=True)
    remove()  # that of an `up` that was killed
    server = await asyncio.start_unix_server(answer, path)
    try:
        yield
    finally:
        server.close()
        remove()


def ask(path: Path) -> SupervisorView | None:
    """None when nobody answers there."""
    data = bytearray()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(ASK_S)
            connection.connect(str(path))
            while len(data) < _MOST_BYTES and (more := connection.recv(64 << 10)):
                data += more
        return msgspec.json.decode(bytes(data), type=SupervisorView)
    except (OSError, msgspec.DecodeError):
        return None
