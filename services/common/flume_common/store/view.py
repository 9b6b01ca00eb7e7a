"""A live view: the decoded values under a prefix, kept up to date while a block runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Generic, TypeVar

import msgspec
import structlog

from flume_common.store.client import Store
from flume_common.store.values import KeyValue
from flume_common.store.watch import Added, Change, Removed
from flume_common.tasks import background

log = structlog.get_logger(__name__)

K = TypeVar("K")
V = TypeVar("V")


class View(Generic[K, V]):
    """Level-triggered: read `current` whenever you like; `changed` only says that it is worth it.

    While etcd is away the last state stays. A value that `decode` refuses (ValueError or
    msgspec.DecodeError) is left out and logged: one bad key must not blind a reader to the others.
    """

    def __init__(self, store: Store, decode: Callable[[KeyValue], tuple[K, V]]) -> None:
        self.revision = 0  # of etcd, when `current` last changed
        self._store = store
        self._decode = decode
        self._names: dict[str, K] = {}  # by etcd's key
        self._current: dict[K, V] = {}
        self._version = 0
        self._seen = 0
        self._moved = asyncio.Condition()

    @property
    def current(self) -> Mapping[K, V]:
        """The state now. Replaced, never altered: whoever holds one keeps a consistent view."""
        return MappingProxyType(self._current)

    @property
    def connected(self) -> bool:
        """Whether etcd answers, and `current` is not just the last thing known."""
        return self._store.connected

    @property
    def version(self) -> int:
        """Counts the changes of `current`."""
        return self._version

    async def changed(self) -> None:
        """Returns at once if anything changed since it last returned, otherwise at the next change.

        For one reader; several use `wait_newer`, each with its own count.
        """
        self._seen = await self.wait_newer(self._seen)

    async def wait_newer(self, version: int) -> int:
        """Waits until `version` is outdated; returns the present one."""
        async with self._moved:
            await self._moved.wait_for(lambda: self._version > version)
            return self._version

    async def apply(self, revision: int, changes: Iterable[Change]) -> None:
        fresh = dict(self._current)
        for change in changes:
            if isinstance(change, Removed):
                self._drop(fresh, change.kv.key)
            else:
                self._take(fresh, change.kv)
        async with self._moved:
            self._current = fresh
            self.revision = revision
            self._version += 1
            self._moved.notify_all()

    def _take(self, fresh: dict[K, V], kv: KeyValue) -> None:
        try:
            name, decoded = self._decode(kv)
        except (ValueError, msgspec.DecodeError) as error:
            log.warning("value_undecodable", key=kv.key, revision=kv.mod_revision, detail=str(error))
            self._drop(fresh, kv.key)
            return
        self._names[kv.key] = name
        fresh[name] = decoded

    def _drop(self, fresh: dict[K, V], key: str) -> None:
        if key in self._names:
            del fresh[self._names.pop(key)]


@asynccontextmanager
async def live(view: View[K, V], store: Store, prefix: str) -> AsyncIterator[None]:
    """Keep `view` up to date while the body runs. Entering waits for the first state."""
    async with store.watch(prefix, relist=True) as watch:
        await view.apply(watch.revision, [Added(kv) for kv in watch.items.values()])
        await view.changed()

        async def follow() -> None:
            async for batch in watch:
                await view.apply(batch.revision, batch.changes)

        async with background(view=follow()):
            yield
