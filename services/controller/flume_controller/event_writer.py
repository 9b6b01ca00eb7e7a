"""Events on their way into etcd. Telling never blocks and never fails; a background task writes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NoReturn

import structlog
from flume_common.backoff import Backoff
from flume_common.election import Fenced
from flume_common.keys import Keys
from flume_common.store import LeaseLost, Put, Store, StoreError
from flume_common.tasks import background

from flume_controller.events import Correlator, Event, Happening, encode

log = structlog.get_logger()

KEEP_S = 3600.0
"""How long an event can be read after it last happened, at least."""
SHARE_S = 300.0
"""Events of so long share one lease, which lives that much longer: a lease each would be thousands."""
MOST_WAITING = 256
"""While etcd is away; the oldest are dropped first."""


class EventWriter:
    """Make it with `event_writer`."""

    def __init__(
        self, store: Store, fenced: Fenced, keys: Keys, correlator: Correlator, clock: Callable[[], float]
    ) -> None:
        self.dropped = 0  # for want of room while etcd was away
        self._store = store
        self._fenced = fenced
        self._keys = keys
        self._correlator = correlator
        self._clock = clock
        self._waiting: dict[str, Event] = {}
        self._poked = asyncio.Event()
        self._lease = 0
        self._lease_until_s = 0.0

    def tell(self, *happenings: Happening) -> None:
        """Soon to be read by everybody, unless too much is told about the same object."""
        for happening in happenings:
            event = self._correlator.take(happening, self._clock())
            if event is not None:
                log.info("event", object=event.object, reason=event.reason, detail=event.message)
                self._put_in_line(event)

    async def run(self) -> NoReturn:
        """Raises Deposed."""
        backoff = Backoff(cap_s=5.0)
        while True:
            try:
                await self._write_all()
                backoff.reset()
            except StoreError as error:
                if isinstance(error, LeaseLost):
                    self._lease_until_s = 0.0
                log.warning("events_not_written", waiting=len(self._waiting), detail=str(error))
                await asyncio.sleep(backoff.next_s())
                continue
            await self._poked.wait()

    def _put_in_line(self, event: Event) -> None:
        # A newer count of the same event replaces the one that waits.
        self._waiting[event.id] = event
        if len(self._waiting) > MOST_WAITING:
            del self._waiting[next(iter(self._waiting))]
            self.dropped += 1
        self._poked.set()

    async def _write_all(self) -> None:
        self._poked.clear()
        while self._waiting:
            id, event = next(iter(self._waiting.items()))
            await self._fenced.txn(
                [], [Put(self._keys.events + id, encode(event), await self._current_lease())]
            )
            if self._waiting.get(id) is event:
                del self._waiting[id]

    async def _current_lease(self) -> int:
        if time.monotonic() >= self._lease_until_s:
            # Never renewed: it ends by itself when the last of its events is old enough.
            self._lease = (await self._store.grant(KEEP_S + SHARE_S)).id
            self._lease_until_s = time.monotonic() + SHARE_S
        return self._lease


@asynccontextmanager
async def event_writer(
    store: Store, fenced: Fenced, keys: Keys, correlator: Correlator, clock: Callable[[], float] = time.time
) -> AsyncIterator[EventWriter]:
    """Written while the body runs; what waits at its end is lost."""
    writer = EventWriter(store, fenced, keys, correlator, clock)
    async with background(event_writer=writer.run()):
        yield writer
