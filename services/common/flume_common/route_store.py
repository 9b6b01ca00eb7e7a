"""Routes in etcd: written by the weight node that owns them, watched by whoever is curious.

A route's key is bound to its owner's lease and written under its owner's epoch: the transaction
compares the owner's member key, so a node that was replaced changes nothing. A sequence's first write takes
it over from whoever owned it before; who lost one so leaves it alone. No step waits for this.

Now and then an owner compares what is in etcd with what it wants: keys that name it and that it does not want
are removed, and so is what no writer has left, as that always has a lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from itertools import islice
from typing import Any, NoReturn

import msgspec
import structlog

from flume_common.backoff import Backoff
from flume_common.keys import Keys
from flume_common.membership import Life, Registration
from flume_common.routes import Route
from flume_common.store import (
    Delete,
    Get,
    KeyValue,
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

MAX_BATCH = 100
"""Routes in one transaction: one operation each and one for the owner stay below etcd's 128."""

RECONCILE_EVERY_S = 5.0
"""How often an owner reads all routes; also soon after it is registered anew."""

MAX_BATCH_RANGES = 8_000
"""Ranges in one transaction: some 100 bytes each stay below etcd's 1.5 MiB for a request."""


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

    def decode(kv: KeyValue) -> tuple[str, Route]:
        route = decode_route(kv)
        if kv.key != keys.route(route.sequence):
            raise ValueError(f"the value is of sequence {route.sequence!r}")
        return route.sequence, route

    routes = Routes(store, decode)
    async with live(routes, store, keys.routes):
        yield routes


class NotWritten(StoreError):
    """Our epoch is old, so that these routes are not ours now, or an earlier write went through after all."""

    def __init__(self, member_key: str, epoch: int, member: KeyValue | None) -> None:
        owned = member is not None and member.create_revision == epoch
        why = "a route's key has changed" if owned else f"{member_key} is not registered under epoch {epoch}"
        super().__init__(f"routes not written: {why}")
        self.member_key = member_key
        self.epoch = epoch


class RouteWriter:
    """Keeps our routes in etcd as they are here, in the background: the newest value of each, soon.

    Use as `async with RouteWriter(store, keys, registration) as writer`. `put` and `end` only note
    what is wanted. After a lost lease all routes are written again, under the new epoch. Every
    `reconcile_every_s` what is in etcd is compared with what is wanted.
    """

    def __init__(
        self,
        store: Store,
        keys: Keys,
        registration: Registration,
        *,
        reconcile_every_s: float = RECONCILE_EVERY_S,
    ) -> None:
        self.refused = 0  # transactions, by etcd
        self.taken_over = 0  # routes of ours, by another owner
        self.removed = 0  # keys that belonged to no sequence
        self._reconcile_every_s = reconcile_every_s
        self._registered_anew = asyncio.Event()
        self._store = store
        self._keys = keys
        self._registration = registration
        self._wanted: dict[str, Route] = {}
        self._dirty: dict[str, None] = {}  # ordered: the longest waiting first
        # mod_revision of the keys we wrote, 0 for none; None when that has to be read.
        self._revisions: dict[str, int | None] = {}
        self._claimed: set[str] = set()  # written at least once
        self._lost: set[str] = set()  # to another owner, and not ended here yet
        self._poked = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._scope = self._run()

    async def __aenter__(self) -> RouteWriter:
        await self._scope.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> bool | None:
        return await self._scope.__aexit__(*error)

    @property
    def pending(self) -> int:
        """Routes whose newest value is not in etcd yet."""
        return len(self._dirty)

    async def settled(self) -> None:
        """Waits until the newest value of every route is in etcd."""
        await self._settled.wait()

    def put(self, route: Route) -> None:
        """Write this route, soon. Its epoch is replaced by the one we are registered under then.

        Ignored once another owner took the sequence over, until `end` is called.
        """
        if route.sequence in self._lost:
            return
        self._wanted[route.sequence] = route
        self._mark(route.sequence)

    def end(self, sequence: str) -> None:
        """Delete this sequence's route, soon. Unknown ones are ignored."""
        self._lost.discard(sequence)
        if self._wanted.pop(sequence, None) is not None:
            self._mark(sequence)

    def end_all(self) -> None:
        """None of our sequences goes on here."""
        for sequence in [*self._wanted, *self._lost]:
            self.end(sequence)

    def _mark(self, sequence: str) -> None:
        self._dirty[sequence] = None
        self._settled.clear()
        self._poked.set()

    @asynccontextmanager
    async def _run(self) -> AsyncIterator[None]:
        async with background(
            route_writer=self._write_forever(),
            route_epoch=self._follow_epoch(),
            route_reconciler=self._reconcile_forever(),
        ):
            yield

    async def _follow_epoch(self) -> NoReturn:
        life = await self._registration.wait_registered()
        while True:
            before, life = life, await self._registration.wait_next(life)
            # The keys of the former lease are gone or going: which, has to be read.
            self._revisions = dict.fromkeys(self._revisions)
            if life.ordinal != before.ordinal:
                # Whose routes were whose came back as it was once: what runs here is ours.
                self._claimed.clear()
            for sequence in self._wanted:
                self._mark(sequence)
            self._registered_anew.set()

    async def _reconcile_forever(self) -> NoReturn:
        while True:
            self._registered_anew.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._reconcile_every_s):
                    await self._registered_anew.wait()
            await self._registration.wait_registered()
            try:
                await self._reconcile()
            except StoreError as error:
                log.debug("routes_not_compared", detail=str(error))

    async def _reconcile(self) -> None:
        """Compare etcd with what is wanted, once. What differs is marked, or removed. Raises StoreError.

        Every change is bound to the revision that was read, so a key that moved on meanwhile stays.
        """
        before = dict(self._wanted)
        stored = (await self._store.range(self._keys.routes)).items
        for sequence, route in before.items():
            # One that changes now is being written anyway.
            if self._wanted.get(sequence) is route and sequence not in self._dirty:
                kv = stored.get(self._keys.route(sequence))
                if (kv.mod_revision if kv else 0) != self._revisions.get(sequence):
                    log.warning("route_not_as_written", sequence=sequence, missing=kv is None)
                    self._revisions[sequence] = None
                    self._mark(sequence)
        wanted = {self._keys.route(sequence) for sequence in (*before, *self._wanted, *self._dirty)}
        for key, kv in stored.items():
            if key not in wanted and is_stray(kv, self._registration.member.id):
                await self._remove(key, kv)

    async def _remove(self, key: str, kv: KeyValue) -> None:
        result = await self._store.txn([mod_revision(key, kv.mod_revision)], [Delete(key)])
        if result.succeeded:
            self.removed += 1
            log.warning("stray_route_removed", key=key)

    async def _write_forever(self) -> NoReturn:
        backoff = Backoff()
        while True:
            await self._poked.wait()
            self._poked.clear()
            while self._dirty:
                life = await self._registration.wait_registered()
                try:
                    await self._write(self._next_batch(), life)
                    backoff.reset()
                except StoreError as error:
                    log.warning("routes_not_written", pending=self.pending, detail=str(error))
                    await asyncio.sleep(backoff.next_s())

    def _next_batch(self) -> dict[str, Route | None]:
        """Newest values of the longest waiting, None to delete, as much as one transaction takes."""
        batch: dict[str, Route | None] = {}
        num_ranges = 0
        for sequence in islice(self._dirty, MAX_BATCH):
            route = batch[sequence] = self._wanted.get(sequence)
            num_ranges += len(route.ranges) if route else 0
            if num_ranges >= MAX_BATCH_RANGES:
                break
        return batch

    async def _write(self, batch: Mapping[str, Route | None], life: Life) -> None:
        """Bring these keys to their values, in one transaction. What fails stays dirty. Raises StoreError."""
        ops = {sequence: self._op(sequence, route, life) for sequence, route in batch.items()}
        done = await self._read_back([s for s in batch if self._revisions.get(s, 0) is None], ops)
        rest = [sequence for sequence in batch if sequence not in done]
        if rest:
            await self._transact({sequence: ops[sequence] for sequence in rest}, life)
        if self._registration.life.number != life.number:
            # Whatever came of it went with the old lease; what was marked since then must stay so.
            self._revisions |= dict.fromkeys(batch)
            return
        for sequence, route in batch.items():
            if route is None or sequence in self._lost:
                self._revisions.pop(sequence, None)
            if self._wanted.get(sequence) is route or sequence in self._lost:
                self._dirty.pop(sequence, None)
        if not self._dirty:
            self._settled.set()

    def _op(self, sequence: str, route: Route | None, life: Life) -> Put | Delete:
        key = self._keys.route(sequence)
        if route is None:
            return Delete(key)
        return Put(key, encode_route(replace(route, epoch=life.epoch)), life.lease)

    async def _read_back(self, sequences: Sequence[str], ops: Mapping[str, Put | Delete]) -> set[str]:
        """Learn the revisions of these keys. Returns those that already are as they should be."""
        if not sequences:
            return set()
        result = await self._store.txn([], [Get(self._keys.route(sequence)) for sequence in sequences])
        done = set()
        for index, sequence in enumerate(sequences):
            kv = result.kv(index)
            self._revisions[sequence] = kv.mod_revision if kv else 0
            if self._is_lost(sequence, ops[sequence], kv):
                self._lose(sequence)
                done.add(sequence)
            elif _is_done(ops[sequence], kv):
                self._settle(sequence, ops[sequence])
                done.add(sequence)
        return done

    def _is_lost(self, sequence: str, op: Put | Delete, kv: KeyValue | None) -> bool:
        """The key is another owner's, and we don't mean to take it over."""
        if kv is None or not (sequence in self._claimed or isinstance(op, Delete)):
            return False
        try:
            return decode_route(kv).weight_node != self._registration.member.id
        except msgspec.DecodeError:
            return False

    def _lose(self, sequence: str) -> None:
        if self._wanted.pop(sequence, None) is not None:
            self._lost.add(sequence)
        self.taken_over += 1
        self._claimed.discard(sequence)
        log.info("route_taken_over", sequence=sequence)

    async def _transact(self, ops: Mapping[str, Put | Delete], life: Life) -> None:
        """All or nothing, and only if we are who we think and nobody touched the keys.

        That also makes it safe to ask again after an unknown outcome: if it did happen, the keys have
        changed, and if it happens later it comes to nothing.
        """
        owner = self._registration.key
        unchanged = [mod_revision(op.key, self._revisions.get(sequence) or 0) for sequence, op in ops.items()]
        fence = create_revision(owner, life.epoch)
        result = await self._store.txn([fence, *unchanged], list(ops.values()), [Get(owner)])
        if not result.succeeded:
            self.refused += 1
            self._revisions |= dict.fromkeys(ops)
            self._registration.look()
            raise NotWritten(self._registration.key, life.epoch, result.kv(0))
        for sequence, op in ops.items():
            self._revisions[sequence] = result.revision if isinstance(op, Put) else 0
            self._settle(sequence, op)

    def _settle(self, sequence: str, op: Put | Delete) -> None:
        """The key is as we want it."""
        if isinstance(op, Put):
            self._claimed.add(sequence)
        else:
            self._claimed.discard(sequence)


def is_stray(kv: KeyValue, node: str) -> bool:
    """True for a key below routes/ that `node`, which does not want it, may remove: its own, or nobody's.

    A writer's key always has its writer's lease, so one without any was left by no writer.
    """
    if not kv.lease:
        return True
    try:
        return msgspec.json.decode(kv.value, type=_Owner).weight_node == node
    except msgspec.DecodeError:
        return False


class _Owner(msgspec.Struct):
    """All that must be right of a route to know whose it is."""

    weight_node: str


def _is_done(op: Put | Delete, kv: KeyValue | None) -> bool:
    if isinstance(op, Delete):
        return kv is None
    return kv is not None and (kv.value, kv.lease) == (op.value, op.lease)
