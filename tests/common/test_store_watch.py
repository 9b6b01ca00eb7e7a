"""A watch misses nothing and invents nothing: on a real etcd, and on a scripted one for what is rare."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest
from flume_common.etcd_binary import embedded_etcd
from flume_common.keys import Keys
from flume_common.store import (
    Added,
    Changed,
    KeyValue,
    Put,
    Removed,
    StoreConfig,
    StoreRefused,
    View,
    connect,
    live,
)
from flume_common.store.watch import diff
from flume_protos.etcd import etcd_pb2 as pb
from flume_protos.etcd import etcd_pb2_grpc as rpc
from hypothesis import given
from hypothesis import strategies as st

PREFIX = "/flume/v1/c/"


def kv(name: str, created: int, written: int) -> KeyValue:
    return KeyValue(PREFIX + name, b"", created, written, 1)


REVISION = st.integers(1, 9)
STATE = st.dictionaries(st.sampled_from("abcd"), st.tuples(REVISION, st.integers(0, 5)), max_size=4).map(
    lambda items: {PREFIX + n: kv(n, c, c + more) for n, (c, more) in items.items()}
)


@given(STATE, STATE)
def test_a_difference_leads_from_the_old_state_to_the_new_one_and_removes_first(old, new):
    changes = diff(old, new)
    kinds = [isinstance(change, Removed) for change in changes]
    assert kinds == sorted(kinds, reverse=True)
    state = dict(old)
    for change in changes:
        match change:
            case Removed(gone):
                assert state.pop(gone.key) == gone
            case Added(fresh):
                assert fresh.key not in state
                state[fresh.key] = fresh
            case Changed(fresh, before):
                assert state[fresh.key] == before
                assert before.create_revision == fresh.create_revision
                state[fresh.key] = fresh
    assert {k: v.mod_revision for k, v in state.items()} == {k: v.mod_revision for k, v in new.items()}


def test_a_key_deleted_and_created_again_meanwhile_is_removed_and_added():
    old, new = kv("a", 1, 3), kv("a", 5, 5)
    assert diff({old.key: old}, {new.key: new}) == [Removed(old), Added(new)]


async def until(watch, done, timeout_s=10.0):
    """Batches until `done(watch)`, whose state then is what was waited for."""
    batches = []
    async with asyncio.timeout(timeout_s):
        while not done(watch):
            batches.append(await anext(watch))
    return batches


def changes_of(batches):
    return [change for batch in batches for change in batch.changes]


async def test_snapshot_then_watch_has_no_gap_while_others_write(store, keys):
    key, last = keys.root + "counter", 400
    await store.put(key, b"")

    async def write() -> None:
        for _ in range(last - 1):
            await store.put(key, b"")

    async def watch_from_some_moment(delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        async with store.watch(keys.root) as watch:
            seen = [watch.snapshot.items[key].version]
            batches = await until(watch, lambda w: w.items[key].version == last)
            seen += [change.kv.version for change in changes_of(batches)]
        assert seen == list(range(seen[0], last + 1))

    watchers = [watch_from_some_moment(0.02 * number) for number in range(10)]
    await asyncio.gather(write(), *watchers)


async def test_each_kind_of_change_is_told_as_what_it_is(store, keys):
    a, b = keys.root + "a", keys.root + "b"
    await store.put(a, b"1")
    async with store.watch(keys.root) as watch:
        await store.put(a, b"2")
        await store.put(b, b"1")
        await store.delete(a)
        await store.put(a, b"3")
        changes = changes_of(await until(watch, lambda w: a in w.items and w.items[a].value == b"3"))
    assert [type(change).__name__ for change in changes] == ["Changed", "Added", "Removed", "Added"]
    assert (changes[0].before.value, changes[0].kv.value) == (b"1", b"2")
    assert changes[2].kv.value == b"2"


async def test_a_transaction_arrives_as_one_batch(store, keys):
    async with store.watch(keys.root) as watch:
        result = await store.txn([], [Put(f"{keys.root}{n}", b"x" * 1000) for n in range(128)])
        batch = await anext(watch)
    assert len(batch.changes) == 128
    assert batch.revision == result.revision


async def test_a_cancelled_read_loses_nothing(store, keys):
    batches, cancelled = [], 0
    async with store.watch(keys.root) as watch:
        for number in range(40):
            await store.put(f"{keys.root}{number}", b"")
            try:
                async with asyncio.timeout(0.0002 * number):
                    batches.append(await anext(watch))
            except TimeoutError:
                cancelled += 1
        batches += await until(watch, lambda w: len(w.items) == 40)
    assert cancelled > 0
    assert [int(change.kv.key.removeprefix(keys.root)) for change in changes_of(batches)] == list(range(40))


async def test_a_broken_connection_is_resumed_with_every_change_between(etcd_endpoint, store, gate, keys):
    async with gate(etcd_endpoint) as between, connect(StoreConfig((between.address,))) as watcher:
        async with watcher.watch(keys.root) as watch:
            await store.put(keys.root + "a", b"0")
            await anext(watch)
            await between.shut()
            reading = asyncio.create_task(until(watch, lambda w: w.items[keys.root + "a"].value == b"3"))
            for value in (b"1", b"2", b"3"):
                await store.put(keys.root + "a", value)
            await asyncio.sleep(0.2)
            await between.open()
            seen = [change.kv.value for change in changes_of(await reading)]
        assert seen == [b"1", b"2", b"3"]
        assert not watcher.watch_resyncs


async def test_history_compacted_while_away_is_made_up_for_by_difference_once(tmp_path, gate):
    async with (
        embedded_etcd(tmp_path, args=["--unsafe-no-fsync"], stop_s=0) as etcd,
        connect(StoreConfig((etcd.endpoint,))) as store,
        gate(etcd.endpoint) as between,
        connect(StoreConfig((between.address,))) as watcher,
    ):
        for name in ("stays", "goes", "reborn", "written"):
            await store.put(PREFIX + name, b"old")
        async with watcher.watch(PREFIX) as watch:
            await store.put(PREFIX + "seen", b"")
            await anext(watch)
            await between.shut()
            reading = asyncio.create_task(anext(watch))
            await asyncio.sleep(0.05)
            await store.delete(PREFIX + "goes")
            await store.delete(PREFIX + "reborn")
            for name in ("reborn", "written", "new"):
                await store.put(PREFIX + name, b"new")
            await store.compact(await store.put("/elsewhere", b""))
            await between.open()

            batch = await asyncio.wait_for(reading, 10)
            told = [(type(change).__name__, change.kv.key.removeprefix(PREFIX)) for change in batch.changes]
            assert batch.resync == "compacted"
            assert set(told[:2]) == {("Removed", "goes"), ("Removed", "reborn")}
            assert told[2:] == [("Added", "reborn"), ("Changed", "written"), ("Added", "new")]

            # etcd sends no revision with that cancellation: it must not be taken for a place to resume.
            await store.put(PREFIX + "after", b"")
            batch = await asyncio.wait_for(anext(watch), 10)
            assert [change.kv.key for change in batch.changes] == [PREFIX + "after"]
        assert watcher.watch_resyncs == {"compacted": 1}


async def test_an_etcd_that_lost_its_data_is_followed_and_not_waited_for(tmp_path):
    async with embedded_etcd(tmp_path / "first", args=["--unsafe-no-fsync"], stop_s=0) as first:
        port = first.client_port
        async with connect(StoreConfig((first.endpoint,))) as store:
            for number in range(20):
                await store.put(f"{PREFIX}{number}", b"")
            async with store.watch(PREFIX) as watch:
                await store.put(PREFIX + "last", b"")
                await anext(watch)
                reading = asyncio.create_task(until(watch, lambda w: set(w.items) == {PREFIX + "fresh"}))
                await first.stop(0)
                async with embedded_etcd(
                    tmp_path / "second", client_port=port, args=["--unsafe-no-fsync"], stop_s=0
                ):
                    async with connect(StoreConfig((first.endpoint,))) as other:
                        await other.put(PREFIX + "fresh", b"")
                    changes = changes_of(await reading)
            assert sum(isinstance(change, Removed) for change in changes) == 21
            assert store.watch_resyncs["behind"] >= 1


async def test_a_view_shows_the_state_and_waits_for_the_next(store, keys):
    def decode(item):
        return item.key.removeprefix(keys.root), int(item.value)

    await store.put(keys.root + "a", b"1")
    view = View(store, decode)
    async with live(view, store, keys.root):
        assert view.current == {"a": 1}
        held = view.current
        await store.put(keys.root + "b", b"2")
        await asyncio.wait_for(view.changed(), 5)
        assert view.current == {"a": 1, "b": 2}
        assert held == {"a": 1}
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(view.changed(), 0.05)


async def test_a_value_that_cannot_be_read_hides_no_other(store, keys):
    await store.put(keys.root + "bad", b"not a number")
    await store.put(keys.root + "turns", b"1")
    view = View(store, lambda item: (item.key.removeprefix(keys.root), int(item.value)))
    async with live(view, store, keys.root):
        assert view.current == {"turns": 1}
        await store.put(keys.root + "turns", b"bad too")
        await asyncio.wait_for(view.changed(), 5)
        assert view.current == {}
        await store.put(keys.root + "bad", b"2")
        await asyncio.wait_for(view.changed(), 5)
        assert view.current == {"bad": 2}


async def test_every_reader_of_a_view_gets_every_wake_up(store, keys):
    view = View(store, lambda item: (item.key, item.value))
    async with live(view, store, keys.root):
        version = view.version
        readers = [asyncio.create_task(view.wait_newer(version)) for _ in range(3)]
        await asyncio.sleep(0)
        await store.put(keys.root + "a", b"")
        assert await asyncio.wait_for(asyncio.gather(*readers), 5) == [version + 1] * 3


class ScriptedEtcd(rpc.KVServicer, rpc.WatchServicer):
    """Each watch stream plays the next script and then stays open; each range gives the next state."""

    def __init__(self, states, scripts):
        self.states, self.scripts = list(states), list(scripts)
        self.asked_from: list[int] = []

    async def Range(self, request, context):
        revision, items = self.states.pop(0)
        return pb.RangeResponse(header=pb.ResponseHeader(revision=revision), kvs=items)

    async def Watch(self, requests, context):
        create = (await context.read()).create_request
        self.asked_from.append(create.start_revision)
        if not self.scripts:
            await asyncio.Event().wait()
        for response in self.scripts.pop(0):
            if response is BREAK:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "test: broken")
            await context.write(response)
        await asyncio.Event().wait()


BREAK = object()


@asynccontextmanager
async def scripted(states, scripts):
    server = grpc.aio.server()
    etcd = ScriptedEtcd(states, scripts)
    rpc.add_KVServicer_to_server(etcd, server)
    rpc.add_WatchServicer_to_server(etcd, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with connect(StoreConfig((f"127.0.0.1:{port}",))) as store:
            yield etcd, store
    finally:
        await server.stop(0)


def answer(revision=0, events=(), **fields):
    return pb.WatchResponse(header=pb.ResponseHeader(revision=revision), events=list(events), **fields)


def written(name, revision):
    item = pb.KeyValue(
        key=(PREFIX + name).encode(), create_revision=revision, mod_revision=revision, version=1
    )
    return pb.Event(type=pb.Event.PUT, kv=item)


async def read_until_asked(etcd, watch, times):
    """Read on until the watch has been opened `times` times; gives the batches of that time."""
    batches = []

    async def read():
        async for batch in watch:
            batches.append(batch)

    reading = asyncio.create_task(read())
    async with asyncio.timeout(5):
        while len(etcd.asked_from) < times:  # noqa: ASYNC110 - the server is a fake without events
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
    reading.cancel()
    return batches


async def test_a_break_while_catching_up_resumes_behind_the_last_change_sent():
    # While it sends history, etcd's header already carries the newest revision.
    catching_up = [answer(100, created=True), answer(100, [written("a", 11), written("b", 12)]), BREAK]
    async with scripted([(10, [])], [catching_up]) as (etcd, store), store.watch(PREFIX) as watch:
        await read_until_asked(etcd, watch, times=2)
        assert etcd.asked_from == [11, 13]


async def test_a_report_of_progress_moves_the_place_to_resume():
    quiet = [answer(10, created=True), answer(50), BREAK]
    async with scripted([(10, [])], [quiet]) as (etcd, store), store.watch(PREFIX) as watch:
        await read_until_asked(etcd, watch, times=2)
        assert etcd.asked_from == [11, 51]


async def test_revision_zero_is_unknown_and_neither_rewinds_nor_resyncs():
    zeros = [answer(0, created=True), answer(0, [written("a", 11)]), answer(0), BREAK]
    async with scripted([(10, [])], [zeros]) as (etcd, store), store.watch(PREFIX) as watch:
        batches = await read_until_asked(etcd, watch, times=2)
        assert etcd.asked_from == [11, 12]
        assert len(batches) == 1
        assert not store.watch_resyncs


async def test_a_compaction_without_a_revision_costs_one_resync_and_no_loop():
    compacted = [answer(0, created=True), answer(0, canceled=True, compact_revision=40)]
    states = [(10, []), (60, [])]
    async with scripted(states, [compacted]) as (etcd, store), store.watch(PREFIX) as watch:
        await read_until_asked(etcd, watch, times=2)
        assert etcd.asked_from == [11, 61]
        assert store.watch_resyncs == {"compacted": 1}


async def test_half_of_a_revision_is_never_shown():
    half = [answer(10, created=True), answer(11, [written("a", 11)], fragment=True), BREAK]
    whole = [
        answer(11, created=True),
        answer(11, [written("a", 11)], fragment=True),
        answer(11, [written("b", 11)]),
        BREAK,
    ]
    async with scripted([(10, [])], [half, whole]) as (etcd, store), store.watch(PREFIX) as watch:
        batches = await read_until_asked(etcd, watch, times=3)
        assert etcd.asked_from == [11, 11, 12]
        assert [[change.kv.key for change in batch.changes] for batch in batches] == [
            [PREFIX + "a", PREFIX + "b"]
        ]


async def test_a_member_that_lags_behind_costs_one_read_and_keeps_its_stream():
    lagging = [answer(4, created=True), answer(11, [written("a", 11)]), BREAK]
    states = [(10, []), (10, [])]
    async with scripted(states, [lagging]) as (etcd, store), store.watch(PREFIX) as watch:
        batches = await read_until_asked(etcd, watch, times=2)
        assert etcd.asked_from == [11, 12]
        assert len(batches) == 1


async def test_a_watch_that_may_not_read_says_so_instead_of_trying_for_ever():
    denied = [answer(0, created=True, canceled=True, cancel_reason="etcdserver: permission denied")]
    async with scripted([(10, [])], [denied]) as (_, store), store.watch(PREFIX) as watch:
        with pytest.raises(StoreRefused, match="permission denied"):
            await asyncio.wait_for(anext(watch), 5)


async def test_a_watch_cancelled_for_any_other_reason_is_opened_again():
    cancelled = [answer(10, created=True), answer(10, canceled=True, cancel_reason="some reason")]
    async with scripted([(10, [])], [cancelled]) as (etcd, store), store.watch(PREFIX) as watch:
        await read_until_asked(etcd, watch, times=2)
        assert etcd.asked_from == [11, 11]


def test_prefixes_of_keys_suit_the_watch():
    assert Keys("c").root == PREFIX
