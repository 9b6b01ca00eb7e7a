"""The requests that are being answered: each has a deadline, so many may wait for their first token, and
all can be seen out before leaving."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from flume_router.errors import DeadlineExceeded, Overloaded, ShuttingDown

_LAST_WORDS_S = 2.0  # for telling clients, once their time is over
_LONGEST_RETRY_AFTER_S = 60
_STARTS_REMEMBERED = 32
MAX_WAITING = 256


class OpenRequest:
    """One of them, while its block runs."""

    def __init__(self, in_flight: InFlight, deadline_at: float) -> None:
        self.deadline_at = deadline_at  # loop time at which it must be over
        self._in_flight = in_flight
        self._waiting = False

    def wait(self) -> None:
        """It is read and checked, and waits for its first token from now on. Raises Overloaded."""
        self._in_flight.check_room()
        self._in_flight.waiting += 1
        self._waiting = True

    def started(self) -> None:
        """It has a token. May be said again."""
        if self._waiting:
            self._in_flight.note_start()
            self.leave_queue()

    def leave_queue(self) -> None:
        if self._waiting:
            self._in_flight.waiting -= 1
            self._waiting = False


class InFlight:
    def __init__(self, deadline_s: float, max_waiting: int = MAX_WAITING) -> None:
        self.deadline_s = deadline_s  # of requests to come
        self.max_waiting = max_waiting
        self.waiting = 0
        self.draining = False
        self._open: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._starts: deque[float] = deque(maxlen=_STARTS_REMEMBERED)  # loop times

    def __len__(self) -> int:
        return len(self._open)

    @asynccontextmanager
    async def request(self) -> AsyncIterator[OpenRequest]:
        """Raises DeadlineExceeded, ShuttingDown, or Overloaded when there is no room to wait."""
        if self.draining:
            raise ShuttingDown
        self.check_room()
        deadline_s = self.deadline_s
        timeout = asyncio.timeout(deadline_s)
        opened = OpenRequest(self, _now_s() + deadline_s)
        try:
            async with timeout:
                self._enter(timeout)
                try:
                    yield opened
                finally:
                    opened.leave_queue()
                    self._leave(timeout)
        except TimeoutError:
            if not timeout.expired():
                raise
            raise (ShuttingDown() if self.draining else DeadlineExceeded(deadline_s)) from None

    def check_room(self) -> None:
        """Raises Overloaded."""
        if self.waiting >= self.max_waiting:
            raise Overloaded(
                "queue",
                f"{self.waiting} requests wait for their first token already",
                retry_after_s=retry_after_s(self.waiting, self._starts),
            )

    def note_start(self) -> None:
        self._starts.append(_now_s())

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


def retry_after_s(waiting: int, starts: deque[float]) -> int:
    """Whole seconds until those that wait will have started, at the pace of the last `starts`."""
    if len(starts) < 2:
        return 1
    seconds = waiting * (starts[-1] - starts[0]) / (len(starts) - 1)
    return min(max(math.ceil(seconds), 1), _LONGEST_RETRY_AFTER_S)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
