"""The link between a supervisor and its engine: msgpack messages over a Unix socket pair.

The supervisor is asyncio and never touches the device; the engine is a plain loop that never waits
for the control plane. Messages are tagged `msgspec.Struct`s, framed by a four-byte length, a handful
per step at most. Either end closing the socket ends the other: an engine never outlives its supervisor.
A frame of length 0 asks the engine for a sign of life, and is the sign. The first one carries the page of
`flume_common.engine_progress`, by which the supervisor knows what the engine does while it computes.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import msgspec
import structlog

from flume_common.engine_progress import Progress, ProgressPage, make_page, work_done
from flume_common.zygote import Fork, ZygoteUnavailable, fork

M = TypeVar("M")
log = structlog.get_logger()
_LENGTH = struct.Struct("<I")
_MAX_MESSAGE_BYTES = 64 << 20
_SIGN_OF_LIFE = _LENGTH.pack(0)
_LOOK_EVERY_S = 1.0
PREPARE_S = 180.0
"""How long an engine that loads, captures or compiles may show no work at all. 18 kernels for Llama-3.1-8B,
once per machine: 3.7 s on one core at 2.6 GHz that does nothing else; a disk over the network may stand still
for a while."""


class LinkClosed(Exception):
    """The other end of the link is gone."""


class EngineLink(Generic[M]):
    """The engine's end: never blocks on receive, so the loop decides when to look.

    `inbox` is the union of message types the supervisor may send.
    """

    def __init__(self, fd: int, inbox: Any) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self._decoder = msgspec.msgpack.Decoder(inbox)
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray()
        self.progress = self._take_page()

    def _take_page(self) -> ProgressPage:
        """The page that lies ready in a new link, or a private one where nobody sent any."""
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, _LENGTH.size, 1)
        except BlockingIOError:
            return ProgressPage()
        self._buffer += data
        return ProgressPage(*fds)

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> list[M]:
        """Every whole message that has arrived; a turn of the engine's loop, and so progress.

        Raises LinkClosed when the supervisor is gone.
        """
        self.progress.turn()
        closed = False
        while True:
            try:
                data = self._socket.recv(1 << 20)
            except BlockingIOError:
                break
            except ConnectionResetError:
                data = b""
            if not data:
                closed = True
                break
            self._buffer += data
        messages: list[M] = []
        at = 0
        while len(self._buffer) - at >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer, at)
            if len(self._buffer) - at - _LENGTH.size < size:
                break
            start = at + _LENGTH.size
            if size:
                messages.append(
                    self._decoder.decode(memoryview(self._buffer)[start : start + size].tobytes())
                )
            else:
                self._write(_SIGN_OF_LIFE)
            at = start + size
        del self._buffer[:at]
        if closed and not messages:
            raise LinkClosed("the supervisor closed the link")
        return messages

    def send(self, message: object) -> None:
        """Queue into the socket; blocks only when the supervisor is megabytes behind."""
        data = self._encoder.encode(message)
        self._write(_LENGTH.pack(len(data)) + data)

    def _write(self, frame: bytes) -> None:
        self._socket.setblocking(True)
        try:
            self._socket.sendall(frame)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise LinkClosed("the supervisor closed the link") from error
        finally:
            self._socket.setblocking(False)


class EngineProcess(Protocol):
    """What a supervisor needs of its engine's process."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative for a signal."""

    async def wait(self) -> int:
        """Until it has ended and been reaped."""

    def kill(self) -> None: ...


class Engine(Generic[M]):
    """The supervisor's end, with the process behind it."""

    def __init__(
        self,
        process: EngineProcess,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        inbox: Any,
        page: ProgressPage | None = None,
    ) -> None:
        """Without a `page` only messages and signs of life show progress."""
        self.process = process
        self.killed_because = ""  # by `watch`
        self._page = page or ProgressPage()
        self._reader = reader
        self._writer = writer
        self._decoder = msgspec.msgpack.Decoder(inbox)
        self._encoder = msgspec.msgpack.Encoder()
        self._heard = False  # since the last look of `watch`

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def progress(self) -> Progress:
        """What the engine is doing, without asking it."""
        return self._page.read()

    def send(self, message: object) -> None:
        """Raises LinkClosed when the engine is gone."""
        if self._writer.is_closing():
            raise LinkClosed(f"engine {self.pid} is gone")
        data = self._encoder.encode(message)
        self._writer.write(_LENGTH.pack(len(data)) + data)

    async def receive(self) -> M:
        """The next message. Raises LinkClosed when the engine closed its end or died."""
        try:
            size = 0
            while not size:
                (size,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                self._heard = True
            if size > _MAX_MESSAGE_BYTES:
                raise LinkClosed(f"engine {self.pid} sent a frame of {size} bytes")
            message: M = self._decoder.decode(await self._reader.readexactly(size))
        # Also one that died while we wrote: what the write met is raised here.
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise LinkClosed(f"engine {self.pid} closed the link") from error
        return message

    async def watch(self, silence_s: Callable[[], float]) -> NoReturn:
        """Kill the engine once it has made no progress for so long; `receive` then raises LinkClosed.

        Progress is a message, a sign of life or a word in its page; how long a step lasts does not matter.
        While the engine prepares, work of its process counts, too, and it has at least PREPARE_S. Somebody
        must be receiving meanwhile. Silence is counted in looks of ours, so that time in which we did not
        run ourselves is not held against the engine.
        """
        looks, before = 0, (0, 0)
        while True:
            self._heard = False
            if not self._writer.is_closing():
                self._writer.write(_SIGN_OF_LIFE)
            await asyncio.sleep(_LOOK_EVERY_S)
            preparing = self.progress.preparing
            now = self._page.beat_ns, work_done(self.pid) if preparing else 0
            looks = 0 if self._heard or now != before else looks + 1
            before = now
            if looks * _LOOK_EVERY_S >= (max(silence_s(), PREPARE_S) if preparing else silence_s()):
                log.error("engine_silent", engine_pid=self.pid, silence_s=looks * _LOOK_EVERY_S)
                self.killed_because = f"made no progress for {looks * _LOOK_EVERY_S:g} s and was killed"
                self.process.kill()
                looks = 0


@asynccontextmanager
async def run_engine(
    module: str,
    args: Sequence[str],
    *,
    inbox: Any,
    env: dict[str, str] | None = None,
    stop_s: float = 5.0,
    zygote: str | None = None,
) -> AsyncIterator[Engine[Any]]:
    """Run `python -m module --link-fd N args…` for as long as the body lasts.

    `zygote` names one (see `flume_common.zygote`) that has the module imported; without it, or where it
    does not answer, a new interpreter does the same later. Leaving the body closes the link, which asks
    the engine to stop; after `stop_s` it is killed.
    """
    page, page_fd = make_page()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    try:
        socket.send_fds(ours, [_SIGN_OF_LIFE], [page_fd])
        process = await _start(module, args, theirs.fileno(), {**os.environ, **(env or {})}, zygote)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        os.close(page_fd)
    reader, writer = await asyncio.open_connection(sock=ours, limit=_MAX_MESSAGE_BYTES)
    try:
        yield Engine(process, reader, writer, inbox, page)
    finally:
        writer.close()
        try:
            async with asyncio.timeout(stop_s):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _start(
    module: str, args: Sequence[str], link_fd: int, env: dict[str, str], zygote: str | None
) -> EngineProcess:
    if zygote:
        # In our process group, so that whoever ends us by it ends the engine, too.
        request = Fork(
            module=module, args=list(args), env=env, fd_flags=["--link-fd"], group=os.getpgrp(), tied=True
        )
        try:
            return await fork(zygote, request, (1, 2, link_fd))
        except ZygoteUnavailable as error:
            log.warning("zygote_unavailable", module=module, reason=str(error))
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, "--link-fd", str(link_fd), *args, pass_fds=(link_fd,), env=env
    )
