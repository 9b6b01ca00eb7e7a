"""The cluster's incarnation: an id in etcd, written once, that names the history its revisions belong to.

Epochs are revisions, and revisions say something only within one history. When etcd comes back empty, older
or as another cluster's, its history is another one, and so the cluster has another incarnation: the old one's
epochs are over, all of them, and every process registers again. Ids have no order: the one in etcd counts.

Whoever finds the id missing, or finds that what etcd says cannot follow from what it said before
(`store.history`), writes a new one, comparing what was there, so that all agree on one. An id that was the
present one before is never taken up again: it came back with an old state.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NoReturn

import msgspec
import structlog

from flume_common.backoff import Backoff
from flume_common.keys import Keys
from flume_common.store import (
    KeyValue,
    Put,
    Store,
    StoreError,
    StoreUnavailable,
    View,
    live,
    mod_revision,
)
from flume_common.tasks import background

log = structlog.get_logger(__name__)

_LOOK_EVERY_S = 30.0
_ATTEMPTS = 20


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON value of `incarnation/current`."""

    id: str
    created_at_s: float  # Unix time
    etcd_cluster_id: str = ""  # hex, of the etcd it was written to; a copy elsewhere does not count
    reason: str = ""  # why the one before was over; empty for the first

    @classmethod
    def of(cls, kv: KeyValue | None) -> Record | None:
        """None when there is none, or the value is none."""
        try:
            return msgspec.json.decode(kv.value, type=cls) if kv else None
        except msgspec.DecodeError:
            return None


class Incarnation:
    """The present incarnation as this process knows it. Made by `follow_incarnation`."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self.record = Record(id="", created_at_s=0.0)
        self.key_revision = 0  # at which the key was last written
        self.ordinal = -1  # how many incarnations came before it, as seen by this process
        self.changed_at_s = float("-inf")  # monotonic; of the last change but the first
        self._store = store
        self.key = keys.incarnation
        self._past: set[str] = set()
        self._moved = asyncio.Condition()
        self._settling = asyncio.Lock()

    @property
    def id(self) -> str:
        """Empty before the first is known."""
        return self.record.id

    @property
    def changes(self) -> int:
        """How many times etcd turned out to be another one than before."""
        return max(0, self.ordinal)

    async def wait_newer(self, ordinal: int) -> int:
        """Wait until there is an incarnation after that one; its ordinal. -1 waits for the first."""
        async with self._moved:
            await self._moved.wait_for(lambda: self.ordinal > ordinal)
            return self.ordinal

    async def settle(self) -> None:
        """Make what we know what is in etcd, now; write a new incarnation where that is called for.

        Raises StoreError.
        """
        async with self._settling:
            rewritten = False
            try:
                for _ in range(_ATTEMPTS):
                    found = await self._store.get(self.key)
                    rewritten |= self._store.history.take()
                    record = Record.of(found)
                    reason = self._against(record, rewritten=rewritten)
                    if record is not None and found is not None and not reason:
                        await self._adopt(record, found.mod_revision)
                        return
                    await self._write(found, reason)
                raise StoreUnavailable("Txn", "others keep writing the incarnation")
            except BaseException:
                if rewritten:
                    self._store.history.put_back()
                raise

    def _against(self, record: Record | None, *, rewritten: bool) -> str:
        """Why this cannot be the present incarnation; empty when it can."""
        if record is None:
            return "no incarnation in etcd" if self.id else "the first"
        if record.id in self._past:
            return "etcd was restored to an earlier state"
        if record.etcd_cluster_id not in ("", self._etcd_cluster_id):
            return "the data was written to another etcd cluster"
        if rewritten and record.id == self.id:
            return "etcd was restored to an earlier state"
        return ""

    @property
    def _etcd_cluster_id(self) -> str:
        return f"{self._store.history.cluster_id:x}"

    async def _write(self, found: KeyValue | None, reason: str) -> None:
        """Write a new one, unless somebody else has meanwhile. Reading follows and settles either."""
        record = Record(
            id=secrets.token_hex(8),
            created_at_s=time.time(),
            etcd_cluster_id=self._etcd_cluster_id,
            reason="" if found is None and not self.id else reason,
        )
        unchanged = mod_revision(self.key, found.mod_revision if found else 0)
        await self._store.txn([unchanged], [Put(self.key, msgspec.json.encode(record))])

    async def _adopt(self, record: Record, revision: int) -> None:
        if record.id == self.id:
            self.key_revision = revision
            return
        async with self._moved:
            if self.id:
                self._past.add(self.id)
                self._store.history.begin_anew()
                self.changed_at_s = time.monotonic()
            before, self.record, self.key_revision = self.record, record, revision
            self.ordinal += 1
            self._moved.notify_all()
        if before.id:
            log.warning("incarnation_changed", before=before.id, now=record.id, reason=record.reason)
        else:
            log.info("incarnation", id=record.id)

    async def follow(self) -> NoReturn:
        """Settle at every change, at every contradiction, and now and then."""
        view: View[str, bytes] = View(self._store, lambda kv: (kv.key, kv.value))
        backoff = Backoff(cap_s=1.0)
        async with live(view, self._store, self.key[: self.key.rindex("/") + 1]):
            version = view.version
            while True:
                try:
                    await self.settle()
                except StoreError as error:
                    log.info("incarnation_not_settled", detail=str(error))
                    await asyncio.sleep(backoff.next_s())
                    continue
                backoff.reset()
                version = await self._wait_sign(view, version)

    async def _wait_sign(self, view: View[str, bytes], version: int) -> int:
        """Until there is any reason to look; the view's version then."""
        changed = asyncio.ensure_future(view.wait_newer(version))
        contradicted = asyncio.ensure_future(self._store.history.contradicted())
        try:
            await asyncio.wait(
                {changed, contradicted}, timeout=_LOOK_EVERY_S, return_when=asyncio.FIRST_COMPLETED
            )
            return changed.result() if changed.done() else version
        finally:
            changed.cancel()
            contradicted.cancel()


@asynccontextmanager
async def follow_incarnation(store: Store, keys: Keys) -> AsyncIterator[Incarnation]:
    """The present incarnation, followed while the body runs. Entering waits for it, and so for etcd.

    Raises StoreRefused when we may not read there.
    """
    incarnation = Incarnation(store, keys)
    async with background(incarnation=incarnation.follow()):
        await incarnation.wait_newer(-1)
        yield incarnation
