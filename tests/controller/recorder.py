"""A watcher of its own that records spec, status and routes, every revision, and has them checked.

    async with ClusterHistory(store, keys) as history:      # in asyncio
        ...
        assert await history.settled() == []

    with recorded("127.0.0.1:2379", "default") as history:  # anywhere else: in a thread
        ...
        assert history.violations() == []

Both are asked while they record. What etcd did not keep for them (it was compacted, or restored) is a gap:
what comes after it is checked on its own, and `gaps` says why.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import msgspec
from flume_common.keys import Keys
from flume_common.membership import Role
from flume_common.store import KeyValue, Removed, Store, StoreConfig, connect
from flume_common.tasks import background
from flume_controller.spec import decode_spec, decode_status

sys.path.insert(0, str(Path(__file__).parent))
import history as of_spec
import route_history as of_routes
from route_history import Ended, Gap, Seen, Written

SETTLE_S = 10.0


class _Range(msgspec.Struct):
    start: int
    end: int | None
    node: str


class _Route(msgspec.Struct):
    """What a route's key holds, whether or not it is a proper one."""

    sequence: str
    weight_node: str
    epoch: int
    ranges: list[_Range]


class ClusterHistory:
    """Records while the body runs."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self.gaps: list[str] = []
        self.routes: list[tuple[int, of_routes.Entry]] = []
        self.specs: list[list[of_spec.Entry]] = [[]]  # one list between two gaps
        self.unreadable: list[str] = []
        self._store, self._keys = store, keys
        self._revision = 0
        self._moved = asyncio.Event()
        self._scope = AsyncExitStack()

    async def __aenter__(self) -> ClusterHistory:
        watch = await self._scope.enter_async_context(self._store.watch(self._keys.root))
        await self._scope.enter_async_context(background(cluster_history=self._follow(watch)))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._scope.__aexit__(*error)

    def violations(self) -> list[str]:
        """What is wrong with all that was recorded so far, in words; empty when nothing is."""
        found = [*self.unreadable, *of_routes.violations(self.routes)]
        for segment in self.specs:
            found += of_spec.violations(segment)
        return found

    async def settled(self) -> list[str]:
        """The violations once all that is written by now was recorded. Raises TimeoutError."""
        marker = f"{self._keys.root}history-marker"
        async with asyncio.timeout(SETTLE_S):
            written = await self._store.put(marker, b"")
            while self._revision < written:
                self._moved.clear()
                await self._moved.wait()
            await self._store.delete(marker)
        return self.violations()

    async def _follow(self, watch) -> None:
        # Who is registered first: the routes that are there already were written by them.
        for kv in sorted(watch.items.values(), key=lambda kv: (not self._is_member(kv), kv.mod_revision)):
            self._take(kv, watch.revision, removed=False)
        self._revision = watch.revision
        async for batch in watch:
            if batch.resync:
                self.gaps.append(batch.resync)
                self.routes.append((batch.revision, Gap()))
                self.specs.append([])
            for change in batch.changes:
                removed = isinstance(change, Removed)
                revision = batch.revision if removed or batch.resync else change.kv.mod_revision
                self._take(change.kv, revision, removed=removed)
            self._revision = batch.revision
            self._moved.set()

    def _is_member(self, kv: KeyValue) -> bool:
        return kv.key.startswith(f"{self._keys.members}{Role.WEIGHT}/")

    def _take(self, kv: KeyValue, revision: int, *, removed: bool) -> None:
        try:
            if self._is_member(kv):
                epoch = None if removed else kv.create_revision
                self.routes.append((revision, Seen(kv.key.rpartition("/")[2], epoch, kv.lease)))
            elif kv.key.startswith(self._keys.routes):
                self.routes.append((revision, _route(kv, removed=removed)))
            elif kv.key == self._keys.spec_attention:
                self.specs[-1].append(of_spec.Entry("spec", decode_spec(kv.value), kv.mod_revision))
            elif kv.key == self._keys.status_attention:
                self.specs[-1].append(of_spec.Entry("status", decode_status(kv.value), kv.mod_revision))
        except (msgspec.DecodeError, ValueError) as error:
            self.unreadable.append(f"{kv.key}@{revision}: {error}")


def _route(kv: KeyValue, *, removed: bool) -> Written | Ended:
    route = msgspec.json.decode(kv.value, type=_Route)
    if removed:
        return Ended(route.sequence)
    ranges = tuple((item.start, item.end, item.node) for item in route.ranges)
    return Written(route.sequence, (route.weight_node, route.epoch), ranges, kv.lease)


class Recording:
    """A ClusterHistory in a thread of its own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, history: ClusterHistory) -> None:
        self._loop, self._history = loop, history

    @property
    def gaps(self) -> list[str]:
        return list(self._history.gaps)

    @property
    def revisions(self) -> int:
        """How many changes of routes, members, spec and status were recorded."""
        return len(self._history.routes) + sum(map(len, self._history.specs))

    def call(self, function: Callable[[], object]) -> None:
        """In that thread."""
        self._loop.call_soon_threadsafe(function)

    def violations(self) -> list[str]:
        """Of all that is written by now. Raises TimeoutError when etcd does not answer."""
        asked = asyncio.run_coroutine_threadsafe(self._history.settled(), self._loop)
        return asked.result(2 * SETTLE_S)


@contextmanager
def recorded(etcd: str, cluster: str = "default") -> Iterator[Recording]:
    """Record a cluster while the body runs. `etcd`: endpoints, comma-separated."""
    started: Future[Recording] = Future()
    stop = asyncio.Event()

    async def record() -> None:
        async with (
            connect(StoreConfig.parse(etcd)) as store,
            ClusterHistory(store, Keys(cluster)) as history,
        ):
            started.set_result(Recording(asyncio.get_running_loop(), history))
            await stop.wait()

    def run() -> None:
        try:
            asyncio.run(record())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=run, name="cluster-history", daemon=True)
    thread.start()
    recording = started.result(30)
    try:
        yield recording
    finally:
        recording.call(stop.set)
        thread.join()
