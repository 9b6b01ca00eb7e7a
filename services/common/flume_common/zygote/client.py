"""Asking a zygote for a child, and following that child. asyncio."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from flume_common.zygote.protocol import MAX_PACKET_BYTES, Answer, Ended, Fork, Forked, Refused, is_ours

ENGINE_ZYGOTE = "FLUME_ENGINE_ZYGOTE"
"""The environment variable that names the zygote to a supervisor that wants an engine."""

UNKNOWN_EXIT = 255
"""The exit code of a child whose zygote died first; only its parent could have known."""

# As long as loading everything takes where the machine is busy: requests wait while it does.
FORK_S = 15.0


class ZygoteUnavailable(Exception):
    """There is no zygote, or it does not answer, or it refuses."""


class ForkedProcess:
    """A child of a zygote, with the part of `asyncio.subprocess.Process` that makes sense for it."""

    def __init__(self, pid: int, pidfd: int, connection: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._pidfd = pidfd
        self._connection = connection

    async def wait(self) -> int:
        """Until it has ended and been reaped. `UNKNOWN_EXIT` when its zygote can no longer tell."""
        if self.returncode is None:
            self.returncode = await self._end()
            os.close(self._pidfd)
            self._connection.close()
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def forget(self) -> None:
        """Stop following it; it runs on unless it is tied to us."""
        if self.returncode is None:
            self.returncode = UNKNOWN_EXIT
            os.close(self._pidfd)
            self._connection.close()

    async def _end(self) -> int:
        try:
            data = await asyncio.get_running_loop().sock_recv(self._connection, MAX_PACKET_BYTES)
        except ConnectionError:
            data = b""
        if not data:
            await _readable(self._pidfd)
            return UNKNOWN_EXIT
        answer = msgspec.msgpack.decode(data, type=Answer)
        assert isinstance(answer, Ended), answer
        return answer.exit_code


async def fork(name: str, request: Fork, fds: Sequence[int], *, timeout_s: float = FORK_S) -> ForkedProcess:
    """A child that does what `request` says, with `fds` as its standard output, error and further ones.

    They stay open here. Raises ZygoteUnavailable; then there is no child, and there won't be one.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.setblocking(False)
        connection.connect(f"\0{name}")
        if not is_ours(connection):
            raise ZygoteUnavailable(f"{name} belongs to another user")
        socket.send_fds(connection, [msgspec.msgpack.encode(request)], fds)
        async with asyncio.timeout(timeout_s):
            await _readable(connection.fileno())
        return _forked(connection)
    except BaseException as error:
        # Closed with the answer unread, the zygote ends the child that it may have made by now.
        connection.close()
        if isinstance(error, TimeoutError):
            raise ZygoteUnavailable(f"no answer within {timeout_s:g} s") from error
        if isinstance(error, OSError):
            raise ZygoteUnavailable(str(error)) from error
        raise


def _forked(connection: socket.socket) -> ForkedProcess:
    data, fds, _, _ = socket.recv_fds(connection, MAX_PACKET_BYTES, 1)
    if not data:
        raise ZygoteUnavailable("it ended")
    match msgspec.msgpack.decode(data, type=Answer):
        case Forked(pid):
            return ForkedProcess(pid, fds[0], connection)
        case Refused(reason):
            raise ZygoteUnavailable(reason)
        case answer:
            raise ZygoteUnavailable(f"unexpected answer {answer}")


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_reader(fd, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(fd)
