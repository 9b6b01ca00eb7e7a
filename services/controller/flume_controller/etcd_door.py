"""A TCP port to the etcd of a local cluster, for tools of our own user: etcdctl, scripts.

etcd itself listens on a socket in a private directory. A connection to this port is passed on to it when
the kernel says that the socket at its other end belongs to our user or to root, and closed otherwise.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import structlog
from flume_common.serving import CannotListen

log = structlog.get_logger()

LOOPBACK = "127.0.0.1"
TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
"""The second has IPv4 connections, too: those made with a socket for both."""
LOOKS = 5
"""A table that changes while it is read may come without a line that is in it."""
MAX_CONNECTIONS = 64
_CHUNK_BYTES = 64 << 10
_ESTABLISHED = "01"
Address = tuple[str, int]


@asynccontextmanager
async def etcd_door(port: int, etcd: Path) -> AsyncIterator[None]:
    """Listen while the body runs. Raises CannotListen."""
    connections: set[asyncio.Task[None]] = set()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            if len(connections) <= MAX_CONNECTIONS and _may_enter(writer):
                await _pass_on(reader, writer, etcd)
        except OSError:
            pass  # etcd is not there, or one of the two has gone
        except asyncio.CancelledError:
            pass  # the door closes
        finally:
            connections.discard(task)
            writer.close()

    try:
        server = await asyncio.start_server(accepted, LOOPBACK, port)
    except OSError as error:
        raise CannotListen(f"{LOOPBACK}:{port}", error.strerror or str(error)) from error
    try:
        yield
    finally:
        server.close()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


def _may_enter(writer: asyncio.StreamWriter) -> bool:
    ours, theirs = writer.get_extra_info("sockname"), writer.get_extra_info("peername")
    if theirs is None:
        return False
    uid = next((uid for _ in range(LOOKS) if (uid := _uid_of(theirs, ours)) is not None), None)
    if uid in (os.getuid(), 0):
        return True
    log.warning("etcd_connection_refused", uid=uid)
    return False


def _uid_of(local: Address, remote: Address) -> int | None:
    for table in TABLES:
        with suppress(FileNotFoundError):  # a kernel without IPv6
            if (uid := uid_of(table.read_text().splitlines(), local, remote)) is not None:
                return uid
    return None


def uid_of(table: Iterable[str], local: Address, remote: Address) -> int | None:
    """Whose socket is connected from `local` to `remote`, by the lines of one of the `TABLES`. Pure.

    None for none: one that is being closed belongs to nobody, and counts as root's in such a table.
    """
    plain = [_hex(local), _hex(remote), _ESTABLISHED]
    mapped = [_MAPPED + plain[0], _MAPPED + plain[1], _ESTABLISHED]
    for line in table:
        fields = line.split()
        if fields[1:4] in (plain, mapped):
            return int(fields[7])
    return None


def _hex(address: Address) -> str:
    (number,) = struct.unpack("=I", socket.inet_aton(address[0]))
    return f"{number:08X}:{address[1]:04X}"


_MAPPED = "".join(f"{number:08X}" for number in struct.unpack("=3I", bytes(10) + b"\xff\xff"))
"""What stands before an IPv4 address that is written as one of IPv6."""


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, etcd: Path) -> None:
    """Both ways, until either end is closed."""
    inner_reader, inner_writer = await asyncio.open_unix_connection(str(etcd))
    try:
        ways = [
            asyncio.ensure_future(_copy(reader, inner_writer)),
            asyncio.ensure_future(_copy(inner_reader, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
    finally:
        inner_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(_CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
