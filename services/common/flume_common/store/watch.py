"""A watch: the keys under a prefix, and every change to them, without a gap.

Read the prefix at revision R, watch from R + 1, resume after a break from one past the last revision
seen in whole. Where history is missing (compacted, or etcd was restored to an earlier state) the
prefix is read again and the difference reported, what is gone before what is new.

etcd accepts a watch from a revision that is yet to come without a word, and an etcd that lost its data and
was written to since may be past ours already: resuming would then miss what was written before. Whoever
wants the state and not each step towards it says `relist`: after every break the prefix is read again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from flume_protos.etcd import etcd_pb2 as pb

from flume_common.backoff import Backoff
from flume_common.store import values
from flume_common.store.errors import StoreRefused, StoreUnavailable, Verdict, verdict
from flume_common.store.transport import Link, Metadata
from flume_common.store.values import KeyValue, Snapshot

if TYPE_CHECKING:
    from flume_common.store.client import Store

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Removed:
    """The key is gone; `kv` is what it last held."""

    kv: KeyValue


@dataclass(frozen=True, slots=True)
class Added:
    """A key that was not there, or was deleted and created again."""

    kv: KeyValue


@dataclass(frozen=True, slots=True)
class Changed:
    """A key was written again."""

    kv: KeyValue
    before: KeyValue


Change = Removed | Added | Changed


@dataclass(frozen=True, slots=True)
class Batch:
    """Changes in the order they happened. All changes of one revision are in one batch."""

    revision: int
    changes: tuple[Change, ...]
    resync: str | None = None  # why history was missing and this is a difference instead


def diff(old: Mapping[str, KeyValue], new: Mapping[str, KeyValue]) -> list[Change]:
    """What leads from one state to another: every Removed, then the rest by revision.

    A key created anew since is Removed and Added, as its old holder is gone.
    """
    removed = [Removed(kv) for key, kv in old.items() if not _same_life(kv, new.get(key))]
    written: list[Added | Changed] = []
    for key, kv in new.items():
        before = old.get(key)
        if before is None or not _same_life(before, kv):
            written.append(Added(kv))
        elif before.mod_revision != kv.mod_revision:
            written.append(Changed(kv, before))
    removed.sort(key=lambda change: change.kv.mod_revision)
    written.sort(key=lambda change: change.kv.mod_revision)
    return [*removed, *written]


def _same_life(old: KeyValue, new: KeyValue | None) -> bool:
    return new is not None and old.create_revision == new.create_revision


def contradicts(known: Mapping[str, KeyValue], revision: int, now: Snapshot) -> bool:
    """Whether `now` cannot be what became of `known`, the state under a prefix at `revision`. Pure.

    What was last written at or before `revision` must have been known, as it is now.
    """
    if now.revision < revision:
        return True
    old = (kv for kv in now.items.values() if kv.mod_revision <= revision)
    return any(known.get(kv.key) != kv for kv in old)


def apply(items: dict[str, KeyValue], events: Iterable[pb.Event], after: int) -> list[Change]:
    """Apply etcd's events to `items`; events up to revision `after` are repeats and change nothing."""
    changes: list[Change] = []
    for event in events:
        if event.kv.mod_revision <= after:
            continue
        key = event.kv.key.decode()
        before = items.pop(key, None)
        if event.type == pb.Event.DELETE:
            changes += [Removed(before)] if before else []
            continue
        kv = items[key] = KeyValue.from_proto(event.kv)
        if before and not _same_life(before, kv):
            changes += [Removed(before), Added(kv)]
        else:
            changes.append(Changed(kv, before) if before else Added(kv))
    return changes


class Watch:
    """An endless iterator of Batch. `items` and `revision` are the state after the last one given.

    A slow reader only makes etcd wait. A read that is cancelled loses nothing.
    Raises StoreRefused when etcd no longer lets us read; never StoreUnavailable: it waits.
    """

    def __init__(self, store: Store, prefix: str, snapshot: Snapshot, *, relist: bool = False) -> None:
        self.prefix = prefix
        self.snapshot = snapshot  # the first one
        self.items = dict(snapshot.items)
        self.revision = snapshot.revision
        self._store = store
        self._relist = relist
        self._broken = False  # the stream was lost, and the prefix has not been read since
        self._life = store.history.life  # that `items` are of
        self._stream: _Stream | None = None
        self._fragments: list[pb.Event] = []
        self._backoff = Backoff()
        self._relogged = False

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> Batch:
        while True:
            try:
                batch = await self._next()
            except StoreUnavailable as error:
                log.info("watch_interrupted", prefix=self.prefix, revision=self.revision, detail=error.detail)
                self.close()
                self._broken = True
                await asyncio.sleep(self._backoff.next_s())
            except BaseException:
                # A cancelled read has cancelled its stream: the next one resumes on a new stream.
                self.close()
                raise
            else:
                if batch is not None:
                    return batch

    def close(self) -> None:
        if self._stream is not None:
            self._stream.call.cancel()
        self._stream = None
        self._fragments.clear()

    async def _next(self) -> Batch | None:
        """One response of the stream, opened when there is none. None: it changed nothing."""
        if self._stream is None:
            if self._broken and self._relist and (batch := await self._read_again()) is not None:
                return batch
            self._stream = await _Stream.open(self._store, self.prefix, self.revision + 1)
        stream = self._stream
        response = await stream.read()
        if response.canceled:
            return await self._on_cancelled(response, stream.metadata)
        self._backoff.reset()
        self._relogged = False
        if response.created:
            return await self._on_created(response.header.revision)
        return self._on_events(response)

    def _on_events(self, response: pb.WatchResponse) -> Batch | None:
        self._fragments.extend(response.events)
        if response.fragment:
            return None  # more of this revision follows: half a transaction is nobody's state
        events, self._fragments = self._fragments, []
        if not events:
            # A progress report: all up to here has been sent. Revision 0 reports nothing.
            self.revision = max(self.revision, response.header.revision)
            return None
        changes = apply(self.items, events, self.revision)
        # Not the header's revision: while a watch catches up that one is ahead of the events sent.
        self.revision = max(self.revision, events[-1].kv.mod_revision)
        return Batch(self.revision, tuple(changes)) if changes else None

    async def _on_created(self, revision: int) -> Batch | None:
        """Another member may merely lag behind; an etcd restored from a backup is behind for good."""
        if revision == 0 or revision >= self.revision:
            return None
        known, life = self.revision, self._life
        batch = await self._resync("behind")
        if self.revision < known:
            self._store.history.contradict("revision_went_back", life, self.revision)
            self.close()  # this stream waits for revisions that are long in coming
        return batch

    async def _on_cancelled(self, response: pb.WatchResponse, metadata: Metadata) -> Batch | None:
        self.close()
        if response.compact_revision:
            return await self._resync("compacted")
        reason = response.cancel_reason or "no reason given"
        if "permission denied" in reason or "auth token" in reason:
            # etcd says "permission denied" also when our login has run out.
            if self._store.transport.config.user is None or self._relogged:
                raise StoreRefused("Watch", grpc.StatusCode.PERMISSION_DENIED, reason)
            self._relogged = True
            self._store.transport.forget_login(metadata)
            return None
        raise StoreUnavailable("Watch", reason)

    async def _read_again(self) -> Batch | None:
        """The difference since the stream broke; says so where that cannot follow from what we knew."""
        before, revision, life = self.items, self.revision, self._life
        batch = await self._resync("reconnected")
        self._broken = False
        if contradicts(before, revision, Snapshot(self.revision, self.items)):
            self._store.history.contradict("state_differs", life, self.revision)
        return batch

    async def _resync(self, reason: str) -> Batch | None:
        snapshot = await self._store.range(self.prefix)
        changes = diff(self.items, snapshot.items)
        self.items = dict(snapshot.items)
        self.revision = snapshot.revision
        self._life = self._store.history.life
        self._store.watch_resyncs[reason] += 1
        log.info("watch_resynced", prefix=self.prefix, reason=reason, changes=len(changes))
        return Batch(self.revision, tuple(changes), reason) if changes else None


@dataclass(slots=True)
class _Stream:
    """One watch stream on one endpoint. Errors come out as StoreError."""

    store: Store
    link: Link
    metadata: Metadata
    call: Any
    answered: bool = False

    @classmethod
    async def open(cls, store: Store, prefix: str, start_revision: int) -> _Stream:
        transport = store.transport
        metadata = await transport.metadata()
        link = transport.link
        create = pb.WatchCreateRequest(
            key=prefix.encode(),
            range_end=values.prefix_end(prefix),
            start_revision=start_revision,
            progress_notify=True,
            fragment=True,
        )
        call = link.watch.Watch(metadata=metadata)
        stream = cls(store, link, metadata, call)
        try:
            async with asyncio.timeout(transport.config.timeout_s):
                await call.write(pb.WatchRequest(create_request=create))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as error:
            raise await stream._failure(error) from None
        except BaseException:
            call.cancel()
            raise
        return stream

    async def read(self) -> pb.WatchResponse:
        # The first answer is due at once; after it silence is normal, and gRPC's pings find the dead.
        limit_s = None if self.answered else self.store.transport.config.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                response: Any = await self.call.read()
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            raise await self._failure(error) from None
        if response is grpc.aio.EOF:
            raise await self._failure(None)
        self.answered = True
        self.store.transport.succeeded(self.link)
        answer: pb.WatchResponse = response
        return answer

    async def _failure(self, error: Exception | None) -> StoreUnavailable | StoreRefused:
        transport = self.store.transport
        if isinstance(error, asyncio.InvalidStateError):
            # A write to a call that has already ended: its status says why.
            code, detail = await self.call.code(), await self.call.details()
        elif isinstance(error, grpc.aio.AioRpcError):
            code, detail = error.code(), error.details() or error.code().name
        else:
            self.call.cancel()
            code = grpc.StatusCode.UNAVAILABLE
            detail = "no answer" if error else "stream ended"
        match verdict(code, detail):
            case Verdict.NEW_TOKEN if transport.config.user:
                transport.forget_login(self.metadata)
                return StoreUnavailable("Watch", detail)
            case Verdict.REFUSED | Verdict.NEW_TOKEN:
                return StoreRefused("Watch", code, detail)
            case _:
                transport.failed(self.link, detail)
                return StoreUnavailable("Watch", f"{self.link.address}: {detail}")


@asynccontextmanager
async def open_watch(store: Store, prefix: str, *, relist: bool = False) -> AsyncIterator[Watch]:
    """See Store.watch."""
    backoff = Backoff()
    while True:
        try:
            snapshot = await store.range(prefix)
            break
        except StoreUnavailable as error:
            log.warning("store_awaited", prefix=prefix, detail=error.detail)
            await asyncio.sleep(backoff.next_s())
    watch = Watch(store, prefix, snapshot, relist=relist)
    try:
        yield watch
    finally:
        watch.close()
