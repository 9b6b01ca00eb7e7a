"""Routes in etcd: written by the weight node that owns them, watched by whoever is curious.

A route's key is bound to its owner's lease and written under its owner's epoch: the transaction
compares the owner's member key, so a node that was replaced changes nothing. No step waits for this.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import islice
from typing import NoReturn

import msgspec
import structlog

from flume_common.backoff import Backoff
from flume_common.keys import Keys
from flume_common.membership import Registration
from flume_common.routes import Route
from flume_common.store import (
    Delete,
    Get,
    KeyValue,
    Op,
    OpResult,
    OutcomeUnknown,
    Put,
    Store,
    StoreError,
    View,
    create_revision,
    live,
    mod_revision,
)
from flume_common.tasks import background

log = structlog.get_logger(__name__)

BATCH = 100
"""Routes in one transaction: one compare each and one for the owner stay below etcd's 128."""


def encode_route(route: Route) -> bytes:
    """JSON: {"sequence", "weight_node", "epoch", "ranges": [{"start", "end", "node"}]}; no `end`: null."""
    return msgspec.json.encode(route)


def decode_route(kv: KeyValue) -> Route:
    """Raises msgspec.DecodeError when the value is no route."""
    return msgspec.json.decode(kv.value, type=Route)


class Routes(View[str, Route]):
    """All routes by sequence, live; see View."""

    def through(self, node: str) -> list[Route]:
        """The routes with a range on attention node `node`."""
        return [route for route in self.current.values() if node in route.nodes]


@asynccontextmanager
async def watch_routes(store: Store, keys: Keys) -> AsyncIterator[Routes]:
    """A live view of all routes. Entering waits for the first state, for as long as etcd is away."""
    routes = Routes(store, lambda kv: (kv.key.removeprefix(keys.routes), decode_route(kv)))
    async with live(routes, store, keys.routes):
        yield routes


class RouteWriter:
    """Keeps our routes in etcd as they are here, in the background: the newest value of each, soon.

    Use as `async with RouteWriter(store, keys, registration) as writer`. `put` and `end` only note
    what is wanted. After a lost lease all routes are written again, under the new epoch.
    """

    def __init__(self, store: Store, keys: Keys, registration: Registration) -> None:
        self._store = store
        self._keys = keys
        self._registration = registration
        self._epoch = 0
        self._wanted: dict[str, Route] = {}
        self._dirty: dict[str, None] = {}  # ordered: the longest waiting first
        # mod_revision of the keys we wrote, 0 for none; None when that has to be read.
        self._revisions: dict[str, int | None] = {}
        self._poked = asyncio.Event()
        self._scope = self._run()

    async def __aenter__(self) -> RouteWriter:
        await self._scope.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> bool | None:
        return await self._scope.__aexit__(*error)  # type: ignore[arg-type]

    @property
    def pending(self) -> int:
        """Routes whose newest value is not in etcd yet."""
        return len(self._dirty)

    def put(self, route: Route) -> None:
        """Write this route, soon. Raises ValueError when its sequence's name can't be a key."""
        self._keys.route(route.sequence)
        self._wanted[route.sequence] = route
        self._mark(route.sequence)

    def end(self, sequence: str) -> None:
        """Delete this sequence's route, soon. Unknown ones are ignored."""
        if self._wanted.pop(sequence, None) is not None:
            self._mark(sequence)

    def _mark(self, sequence: str) -> None:
        self._dirty[sequence] = None
        self._poked.set()

    @asynccontextmanager
    async def _run(self) -> AsyncIterator[None]:
        async with background(route_writer=self._write_forever(), route_epoch=self._follow_epoch()):
            yield

    async def _follow_epoch(self) -> NoReturn:
        while True:
            self._epoch = await self._registration.wait_epoch(self._epoch)
            # The keys of the former lease are gone or going: which, has to be read.
            self._revisions = dict.fromkeys(self._revisions)
            for sequence in self._wanted:
                self._mark(sequence)

    async def _write_forever(self) -> NoReturn:
        backoff = Backoff()
        while True:
            await self._poked.wait()
            self._poked.clear()
            while self._dirty:
                try:
                    await self._write(list(islice(self._dirty, BATCH)), self._epoch, self._registration.lease)
                    backoff.reset()
                except StoreError as error:
                    log.warning("routes_not_written", pending=self.pending, detail=str(error))
                    await asyncio.sleep(backoff.next_s())

    async def _write(self, sequences: list[str], epoch: int, lease: int) -> None:
        """One transaction. What fails stays dirty."""
        await self._read_back([s for s in sequences if self._revisions.get(s, 0) is None])
        values = {s: self._wanted.get(s) for s in sequences}
        compares, ops = [create_revision(self._registration.key, epoch)], list[Op]()
        for sequence, route in values.items():
            key = self._keys.route(sequence)
            compares.append(mod_revision(key, self._revisions.get(sequence) or 0))
            ops.append(Put(key, encode_route(replace(route, epoch=epoch)), lease) if route else Delete(key))
        try:
            result = await self._store.txn(compares, ops, [Get(self._keys.route(s)) for s in sequences])
        except OutcomeUnknown:
            self._revisions |= dict.fromkeys(sequences)
            raise
        if not result.succeeded:
            # Our epoch is old, or an earlier write went through after all: read, then decide again.
            self._learn(sequences, result.results)
            await self._registration.wait_epoch(epoch - 1)
            await asyncio.sleep(0.02)
            return
        for sequence, route in values.items():
            self._settle(sequence, route, result.revision)

    def _settle(self, sequence: str, route: Route | None, revision: int) -> None:
        if route is None:
            self._revisions.pop(sequence, None)
        else:
            self._revisions[sequence] = revision
        if self._wanted.get(sequence) is route:
            self._dirty.pop(sequence, None)

    async def _read_back(self, sequences: list[str]) -> None:
        if sequences:
            result = await self._store.txn([], [Get(self._keys.route(s)) for s in sequences])
            self._learn(sequences, result.results)

    def _learn(self, sequences: Iterable[str], found: Iterable[OpResult]) -> None:
        for sequence, kv in zip(sequences, found, strict=True):
            self._revisions[sequence] = kv.mod_revision if isinstance(kv, KeyValue) else 0
