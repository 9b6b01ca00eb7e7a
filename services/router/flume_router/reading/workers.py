"""The worker processes of a router: started when one is needed, killed when one takes too long.

A worker that ends, whatever the reason, costs the request it had; the next one gets a new worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

import structlog

from flume_router.errors import ReaderFailed
from flume_router.reading import frames

log = structlog.get_logger(__name__)

_MODULE = "flume_router.reading.worker"


class Worker:
    """One process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process = process
        self._orders = process.stdin
        self._replies = process.stdout

    async def call(self, order: frames.Setup | frames.Task) -> frames.Reply:
        """Raises ReaderFailed if it ends instead."""
        try:
            self._orders.write(frames.encode(order))
            await self._orders.drain()
            (length,) = frames.LENGTH.unpack(await self._replies.readexactly(frames.LENGTH.size))
            return frames.decode_reply(await self._replies.readexactly(length))
        except (OSError, asyncio.IncompleteReadError) as error:
            raise ReaderFailed("its process ended") from error

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None or self._replies.at_eof()

    async def end(self) -> None:
        """Kill it and wait, also when cancelled."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await asyncio.shield(self._process.wait())


class Workers:
    """At most `size` of them, made by `open_workers`."""

    def __init__(self, setup: frames.Setup, *, size: int, time_limit_s: float) -> None:
        self._setup = setup
        self._time_limit_s = time_limit_s
        self._turns = asyncio.Semaphore(size)
        self._idle: list[Worker] = []
        self.started = 0

    async def run(self, task: frames.Task) -> frames.Reply:
        """The reply to a task, once its turn has come. Raises ReaderFailed."""
        async with self._turns:
            worker = await self._taken()
            try:
                async with asyncio.timeout(self._time_limit_s):
                    reply = await worker.call(task)
            except TimeoutError:
                await worker.end()
                raise ReaderFailed(f"it takes longer than {self._time_limit_s:g} s") from None
            except BaseException:
                # The client is gone, or the process: what it works on is of no use to anyone.
                await worker.end()
                raise
            self._idle.append(worker)
            return reply

    async def prestart(self) -> None:
        """Have one ready before it is needed."""
        async with self._turns:
            with contextlib.suppress(ReaderFailed):
                self._idle.append(await self._taken())

    async def close(self) -> None:
        while self._idle:
            await self._idle.pop().end()

    async def _taken(self) -> Worker:
        while self._idle:
            worker = self._idle.pop()
            if not worker.ended:
                return worker
            await worker.end()
        return await self._start()

    async def _start(self) -> Worker:
        worker = Worker(
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", _MODULE),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
        )
        try:
            async with asyncio.timeout(self._time_limit_s):
                reply = await worker.call(self._setup)
            if isinstance(reply, frames.Failed):
                raise ReaderFailed(reply.why)
        except BaseException as error:
            await worker.end()
            if isinstance(error, TimeoutError):
                raise ReaderFailed("its process does not start") from None
            raise
        self.started += 1
        log.info("request_reader_started", started_total=self.started)
        return worker


@contextlib.asynccontextmanager
async def open_workers(setup: frames.Setup, *, size: int, time_limit_s: float) -> AsyncIterator[Workers]:
    """None is started yet. A task may run for `time_limit_s`."""
    workers = Workers(setup, size=size, time_limit_s=time_limit_s)
    try:
        yield workers
    finally:
        await workers.close()
