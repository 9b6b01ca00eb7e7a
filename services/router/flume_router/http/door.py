"""The connections of the HTTP server: how many there are, which are idle, and when each is over."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Protocol

from flume_router.http.limits import OVERFLOW_CONNECTIONS, HttpLimits
from flume_router.http.refusals import Refusals

SWEEP_S = 0.25
"""How often time limits are looked at."""


class Swept(Protocol):
    """A connection, as the door sees it."""

    def close_idle(self) -> None: ...
    def check(self, now: float) -> None:
        """Close it if a time limit is over."""


class Door:
    """All connections of one server. Those that wait for a request are kept in the order they began to."""

    def __init__(self, limits: HttpLimits, refusals: Refusals) -> None:
        self.limits = limits
        self.refusals = refusals
        self._connections: set[Swept] = set()
        self._idle: dict[Swept, None] = {}
        self._left = asyncio.Event()

    def __len__(self) -> int:
        return len(self._connections)

    def __iter__(self) -> Iterator[Swept]:
        return iter(self._connections)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def enter(self, connection: Swept) -> bool:
        """False when it is one too many, although the connection that was idle longest gave way."""
        self._connections.add(connection)
        if len(self._connections) <= self.limits.max_connections:
            return True
        self.close_idlest()
        return len(self._connections) <= self.limits.max_connections

    def leave(self, connection: Swept) -> None:
        self._connections.discard(connection)
        self._idle.pop(connection, None)
        self._left.set()

    def set_idle(self, connection: Swept, idle: bool) -> None:
        if idle:
            self._idle.setdefault(connection)
        else:
            self._idle.pop(connection, None)

    def close_idlest(self) -> None:
        """Close the connection that has been idle longest, if there is one."""
        oldest = next(iter(self._idle), None)
        if oldest is not None:
            self.leave(oldest)
            oldest.close_idle()

    async def until_room(self) -> None:
        """Wait until another connection may be accepted, be it to refuse it."""
        while len(self._connections) >= self.limits.max_connections + OVERFLOW_CONNECTIONS:
            self._left.clear()
            await self._left.wait()

    async def sweep(self) -> None:
        """For ever: close what is over."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S)
            now = loop.time()
            for connection in tuple(self._connections):
                connection.check(now)
