"""What operators wrote, the spec and the settings, as this controller last saw it: for an etcd that lost it.

It is read together with the cluster's incarnation, at one revision: a setting that is gone in the same one
was taken back by an operator, one that is gone in another was lost. A spec is never taken back. Every
controller keeps this, whether it leads or not; only the leader writes it back (`fleet.py`), where etcd has no
spec. An etcd that has one says what is wanted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import NoReturn

import structlog
from flume_common.backoff import Backoff
from flume_common.incarnation import Incarnation, Record
from flume_common.keys import Keys
from flume_common.store import MAX_TXN_OPS, Get, GetPrefix, KeyValue, Op, Put, Store, StoreError, View, live
from flume_common.tasks import background

log = structlog.get_logger()

NEWS_S = 600.0
"""A leader that begins later has nothing to tell: the one before did."""
MOST_SETTINGS = MAX_TXN_OPS - 8
"""Put back in one transaction, beside the spec."""


class LastKnown:
    """Made by `follow_last_known`."""

    def __init__(self, store: Store, keys: Keys, incarnation: Incarnation) -> None:
        self.incarnation = incarnation
        self._store = store
        self._keys = keys
        self._prefixes = (_folder(keys.spec_attention), keys.config, keys.config_history)
        self._kept: Mapping[str, bytes] = {}  # by etcd's keys
        self._kept_in = incarnation.id
        self._announced = incarnation.ordinal

    @property
    def spec(self) -> bytes | None:
        """The spec's value; None when there never was any."""
        return self._kept.get(self._keys.spec_attention)

    async def lost_settings(self) -> list[Put]:
        """Settings, and who set them, that the former incarnation had and this one lacks. Raises StoreError.

        Empty while it is the same one.
        """
        if self._kept_in == self.incarnation.id:
            return []
        _, there = await self._read()
        lost = self._kept.keys() - there.keys() - {self._keys.spec_attention}
        return [Put(key, self._kept[key]) for key in sorted(lost)][:MOST_SETTINGS]

    @property
    def incarnation_age_s(self) -> float:
        """Since this process took up the present incarnation, where it knew another one before."""
        return time.monotonic() - self.incarnation.changed_at_s

    @property
    def has_news(self) -> bool:
        """Whether `announce` has not been asked about the present incarnation yet."""
        return self._announced != self.incarnation.ordinal

    def announce(self) -> bool:
        """Whether there is a new incarnation that this was not asked for yet, and that is news."""
        before, self._announced = self._announced, self.incarnation.ordinal
        # Not the record's age: another cluster's incarnation may be old, and news here.
        return before != self._announced and self.incarnation_age_s < NEWS_S

    async def look(self) -> None:
        """Keep what is there now, unless it is what another etcd begins with. Raises StoreError."""
        id, values = await self._read()
        if id == self._kept_in or self._keys.spec_attention in values:
            spec = {self._keys.spec_attention: self.spec} if self.spec is not None else {}
            self._kept, self._kept_in = spec | values, id

    async def _read(self) -> tuple[str, dict[str, bytes]]:
        """The present incarnation, and all of it that concerns us. Raises StoreError."""
        while True:
            wanted: list[Op] = [Get(self._keys.incarnation), *map(GetPrefix, self._prefixes)]
            result = await self._store.txn([], wanted)
            record = Record.of(result.kv(0))
            if record is not None and record.id == self.incarnation.id:
                found = (kv for part in result.results[1:] if isinstance(part, tuple) for kv in part)
                return record.id, {kv.key: kv.value for kv in found}
            await self.incarnation.settle()

    @asynccontextmanager
    async def live(self) -> AsyncIterator[None]:
        """Look at every change while the body runs. Entering waits for the first state."""
        views: list[View[str, bytes]] = [View(self._store, _raw) for _ in self._prefixes]
        spec, config, history = views
        async with (
            live(spec, self._store, self._prefixes[0]),
            live(config, self._store, self._prefixes[1]),
            live(history, self._store, self._prefixes[2]),
            background(last_known=self._follow(views)),
        ):
            yield

    async def _follow(self, views: list[View[str, bytes]]) -> NoReturn:
        backoff = Backoff(cap_s=1.0)
        while True:
            versions = [view.version for view in views]
            try:
                await self.look()
            except StoreError as error:
                log.info("last_known_not_read", detail=str(error))
                await asyncio.sleep(backoff.next_s())
                continue
            backoff.reset()
            await _changed(views, versions)


async def _changed(views: list[View[str, bytes]], versions: list[int]) -> None:
    waits = [asyncio.ensure_future(view.wait_newer(seen)) for view, seen in zip(views, versions, strict=True)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


@asynccontextmanager
async def follow_last_known(store: Store, keys: Keys, incarnation: Incarnation) -> AsyncIterator[LastKnown]:
    """Followed while the body runs. Entering waits for the first state, for as long as etcd is away."""
    known = LastKnown(store, keys, incarnation)
    async with known.live():
        yield known


def _folder(key: str) -> str:
    return key[: key.rindex("/") + 1]


def _raw(kv: KeyValue) -> tuple[str, bytes]:
    return kv.key, kv.value
