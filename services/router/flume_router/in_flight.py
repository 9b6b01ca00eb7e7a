"""The requests that are being answered: each has a deadline, and all can be seen out before leaving."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from flume_router.errors import DeadlineExceeded, ShuttingDown

_LAST_WORDS_S = 2.0  # for telling clients, once their time is over


class InFlight:
    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s  # of requests to come
        self._open: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    def __len__(self) -> int:
        return len(self._open)

    @asynccontextmanager
    async def request(self) -> AsyncIterator[float]:
        """Yields the loop time at which it must be over. Raises DeadlineExceeded or ShuttingDown."""
        if self.draining:
            raise ShuttingDown
        deadline_s = self.deadline_s
        timeout = asyncio.timeout(deadline_s)
        try:
            async with timeout:
                self._enter(timeout)
                try:
                    yield asyncio.get_running_loop().time() + deadline_s
                finally:
                    self._leave(timeout)
        except TimeoutError:
            if not timeout.expired():
                raise
            raise (ShuttingDown() if self.draining else DeadlineExceeded(deadline_s)) from None

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests, let open ones finish for `grace_s`, then end them with ShuttingDown."""
        self.draining = True
        if await self._idle_within(grace_s):
            return
        now = asyncio.get_running_loop().time()
        for timeout in tuple(self._open):
            timeout.reschedule(now)
        await self._idle_within(_LAST_WORDS_S)

    async def _idle_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        return self._idle.is_set()

    def _enter(self, timeout: asyncio.Timeout) -> None:
        self._open.add(timeout)
        self._idle.clear()

    def _leave(self, timeout: asyncio.Timeout) -> None:
        self._open.discard(timeout)
        if not self._open:
            self._idle.set()
