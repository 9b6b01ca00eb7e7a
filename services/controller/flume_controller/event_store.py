"""Events in etcd: reading and watching them. Writing is the leader's, in `event_writer.py`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import structlog
from flume_common.keys import Keys
from flume_common.store import KeyValue, Store, View, live

from flume_controller.events import Event, decode, in_order

log = structlog.get_logger()


class Events(View[str, Event]):
    """All events of the last hour, by id; see View."""

    def listed(self) -> list[Event]:
        """Oldest first."""
        return in_order(list(self.current.values()))


async def read(store: Store, keys: Keys) -> list[Event]:
    """All events, oldest first. Raises StoreError. One that can't be read is left out and logged."""
    found = await store.range(keys.events)
    events = (_event_or_none(kv) for kv in found.items.values())
    return in_order([event for event in events if event is not None])


@asynccontextmanager
async def watch(store: Store, keys: Keys) -> AsyncIterator[Events]:
    """All events, live. Entering waits for the first state, for as long as etcd is away."""
    events = Events(store, lambda kv: (kv.key.rpartition("/")[2], decode(kv.value)))
    async with live(events, store, keys.events):
        yield events


def _event_or_none(kv: KeyValue) -> Event | None:
    try:
        return decode(kv.value)
    except (ValueError, msgspec.DecodeError) as error:
        log.warning("event_unreadable", key=kv.key, error=str(error))
        return None
