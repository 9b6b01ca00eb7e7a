"""The cluster's incarnation over an etcd that is wiped, restored, replaced: real etcds, and pure parts."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from flume_common.epochs import epoch_of, revision_of
from flume_common.incarnation import Record, follow_incarnation
from flume_common.keys import Keys
from flume_common.membership import Member, Role, State, register, watch_members
from flume_common.route_store import RouteWriter, watch_routes
from flume_common.routes import Route
from flume_common.store import KeyValue, Snapshot, StoreConfig, connect
from flume_common.store.history import History
from flume_common.store.watch import contradicts
from flume_protos.etcd import etcd_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent))
from etcd_backup import replaceable_etcd

KEYS = Keys("c")
SOON_S = 10.0


def member(name="w0", role=Role.WEIGHT, **changes):
    fields = {
        "id": name, "role": role, "state": State.READY, "address": "127.0.0.1:1", "host": "h", "pid": 1,
        "version": "0", "protocol_version": 1, "started_at_s": time.time(),
    }  # fmt: skip
    return Member(**(fields | changes))


@asynccontextmanager
async def process(endpoint, name="w0", role=Role.WEIGHT):
    """What every process has: a store, the incarnation, a member of its own and a view of all."""
    async with (
        connect(StoreConfig((endpoint,), timeout_s=1.0)) as store,
        follow_incarnation(store, KEYS) as incarnation,
        watch_members(store, KEYS) as members,
        register(store, KEYS, member(name, role), ttl_s=5, incarnation=incarnation) as registration,
    ):
        yield Process(store, incarnation, members, registration)


class Process:
    def __init__(self, store, incarnation, members, registration):
        self.store, self.incarnation, self.members = store, incarnation, members
        self.registration = registration

    def is_seen_by(self, other):
        ours = self.registration
        seen = other.members.current.get((ours.member.role, ours.member.id))
        return ours.registered and seen is not None and seen.epoch == ours.epoch


async def until(done, what, timeout_s=SOON_S):
    try:
        async with asyncio.timeout(timeout_s):
            while not done():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s: {what}") from None


async def agree(processes, before):
    """All are in one incarnation, another one than before, registered in it and seen by all."""
    ids = lambda: {p.incarnation.id for p in processes}  # noqa: E731
    await until(lambda: len(ids()) == 1 and before not in ids(), "one incarnation")
    await until(
        lambda: all(p.registration.life.incarnation == p.incarnation.id for p in processes), "registered anew"
    )
    await until(
        lambda: all(a.is_seen_by(b) for a, b in itertools.product(processes, repeat=2)), "seen by all"
    )


async def write_some(store, count):
    for number in range(count):
        await store.put(f"{KEYS.root}events/{number}", b"x")


@asynccontextmanager
async def three(endpoint):
    async with AsyncExitStack() as stack:
        names = [("w0", Role.WEIGHT), ("a0", Role.ATTENTION), ("r0", Role.ROUTER)]
        yield [await stack.enter_async_context(process(endpoint, *name)) for name in names]


async def test_the_first_process_writes_the_incarnation_and_the_others_take_it(store, keys):
    async with (
        follow_incarnation(store, keys) as one,
        follow_incarnation(store, keys) as other,
    ):
        assert one.id == other.id and one.changes == other.changes == 0
        record = Record.of(await store.get(keys.incarnation))
        assert record.id == one.id and record.reason == "" and record.etcd_cluster_id != "0"


async def test_many_that_start_at_once_agree_on_one(store, keys):
    async with AsyncExitStack() as stack:
        entering = [stack.enter_async_context(follow_incarnation(store, keys)) for _ in range(8)]
        made = await asyncio.gather(*entering)
        assert len({incarnation.id for incarnation in made}) == 1
        assert [incarnation.changes for incarnation in made] == [0] * 8


@pytest.mark.parametrize("away_s", [0.0, 1.5])
async def test_an_etcd_that_comes_back_empty_is_a_new_incarnation_for_all(tmp_path, away_s):
    async with replaceable_etcd(tmp_path / "etcd") as etcd, three(etcd.endpoint) as processes:
        await write_some(processes[0].store, 40)
        before = processes[0].incarnation.id
        epochs = [p.registration.epoch for p in processes]
        await etcd.wipe(away_s)
        await agree(processes, before)
        assert [p.incarnation.changes for p in processes] == [1, 1, 1], "all see the same one change"
        assert max(p.registration.epoch for p in processes) < 40, "the test shows nothing"
        assert all(p.registration.life.ordinal == 1 for p in processes)
        assert all(
            epoch_of(1, p.registration.epoch) > epoch_of(0, old)
            for p, old in zip(processes, epochs, strict=True)
        )


@pytest.mark.parametrize("token", ["etcd-cluster", "another"])
@pytest.mark.parametrize("lost", [1, 3, 40])
async def test_an_etcd_restored_to_an_earlier_state_is_a_new_incarnation(tmp_path, lost, token):
    """The incarnation's key comes back as it was, and so do members with their leases."""
    async with replaceable_etcd(tmp_path / "etcd") as etcd, three(etcd.endpoint) as processes:
        await write_some(processes[0].store, 10)
        await etcd.save(tmp_path / "snapshot")
        before = processes[0].incarnation.id
        await write_some(processes[0].store, lost)
        await etcd.restore(tmp_path / "snapshot", token=token)
        await agree(processes, before)
        assert [p.incarnation.changes for p in processes] == [1, 1, 1]
        assert processes[0].incarnation.record.reason


async def test_restored_twice_to_the_same_state_is_two_new_incarnations(tmp_path):
    async with replaceable_etcd(tmp_path / "etcd") as etcd, three(etcd.endpoint) as processes:
        await etcd.save(tmp_path / "snapshot")
        ids = [processes[0].incarnation.id]
        for _ in range(2):
            await write_some(processes[0].store, 5)
            await etcd.restore(tmp_path / "snapshot")
            await agree(processes, ids[-1])
            ids.append(processes[0].incarnation.id)
        assert len(set(ids)) == 3


async def test_an_etcd_of_another_cluster_is_a_new_incarnation_for_those_that_come_to_it(tmp_path):
    """The other one has an incarnation, members of the same names, and is further on than ours."""
    other = tmp_path / "other"
    async with replaceable_etcd(tmp_path / "first") as etcd, three(etcd.endpoint) as processes:
        await write_some(processes[0].store, 100)
        await etcd.save(other)
        foreign = processes[0].incarnation.id
    async with replaceable_etcd(tmp_path / "etcd") as etcd, three(etcd.endpoint) as processes:
        before = processes[0].incarnation.id
        await etcd.restore(other, token="other")
        await agree(processes, before)
        assert processes[0].incarnation.id != foreign
        assert {p.incarnation.changes for p in processes} <= {1, 2}


async def test_an_etcd_that_is_only_restarted_or_away_is_no_other_one(tmp_path):
    async with replaceable_etcd(tmp_path / "etcd") as etcd, three(etcd.endpoint) as processes:
        lives = [p.registration.life for p in processes]
        for _ in range(3):
            await etcd.kill()
            await write_while_away(processes[0])
            await etcd.start()
            await until(lambda: all(p.store.connected for p in processes), "connected")
            await write_some(processes[0].store, 5)
        await asyncio.sleep(1.0)
        assert [p.incarnation.changes for p in processes] == [0, 0, 0]
        assert [p.registration.life for p in processes] == lives
        assert not any(p.store.history.contradictions for p in processes)


async def write_while_away(one):
    await one.registration.update(sequences=one.registration.member.sequences + 1)
    await asyncio.sleep(0.3)


async def test_an_incarnation_that_somebody_deletes_is_written_anew_and_all_register_again(store, keys):
    async with (
        follow_incarnation(store, keys) as incarnation,
        register(store, keys, member(), ttl_s=5, incarnation=incarnation) as registration,
    ):
        life, before = registration.life, incarnation.id
        await store.delete_prefix(keys.root)
        async with asyncio.timeout(SOON_S):
            after = await registration.wait_next(life)
            while after.incarnation == before:
                after = await registration.wait_next(after)
        assert incarnation.changes == 1 and after.incarnation == incarnation.id
        assert (await store.get(registration.key)).create_revision == after.epoch


async def test_routes_are_written_again_and_those_that_came_back_from_the_dead_are_gone(tmp_path):
    async with (
        replaceable_etcd(tmp_path / "etcd") as etcd,
        process(etcd.endpoint) as one,
        RouteWriter(one.store, KEYS, one.registration) as writer,
        watch_routes(one.store, KEYS) as routes,
    ):
        writer.put(Route.start("ended", "w0", 0, "a0"))
        await asyncio.wait_for(writer.settled(), SOON_S)
        await etcd.save(tmp_path / "snapshot")
        writer.end("ended")
        writer.put(Route.start("runs", "w0", 0, "a0"))
        await asyncio.wait_for(writer.settled(), SOON_S)
        await etcd.restore(tmp_path / "snapshot")
        await until(lambda: one.incarnation.changes == 1, "a new incarnation")
        await until(
            lambda: {s: r.epoch for s, r in routes.current.items()} == {"runs": one.registration.epoch},
            "the routes as they are here",
        )


async def test_a_sequence_taken_over_in_the_lost_history_stays_ours(tmp_path):
    """etcd says again that the other one has it."""
    async with (
        replaceable_etcd(tmp_path / "etcd") as etcd,
        process(etcd.endpoint, "w1") as one,
        RouteWriter(one.store, KEYS, one.registration) as writer,
        watch_routes(one.store, KEYS) as routes,
    ):
        lease = (await one.store.grant(600)).id
        await one.store.put(KEYS.route("s"), msgspec.json.encode(Route.start("s", "w0", 1, "a0")), lease)
        await etcd.save(tmp_path / "snapshot")
        writer.put(Route.start("s", "w1", 0, "a0"))
        await asyncio.wait_for(writer.settled(), SOON_S)
        await etcd.restore(tmp_path / "snapshot")
        await until(lambda: one.incarnation.changes == 1, "a new incarnation")
        await until(lambda: one.registration.life.ordinal == 1, "registered anew")
        await until(
            lambda: (
                ("w1", one.registration.epoch)
                in [(route.weight_node, route.epoch) for route in routes.current.values()]
            ),
            "the route is ours",
        )
        assert writer.taken_over == 0


async def test_a_view_shows_what_was_written_below_its_revision_in_the_new_history(tmp_path):
    """etcd takes a watch from a future revision without a word; resuming would miss all of this."""
    async with (
        replaceable_etcd(tmp_path / "etcd") as etcd,
        connect(StoreConfig((etcd.endpoint,), timeout_s=1.0)) as store,
        connect(StoreConfig((etcd.endpoint,), timeout_s=1.0)) as other,
        watch_members(store, KEYS) as members,
    ):
        await other.put(KEYS.member("weight", "ghost"), member("ghost").encode())
        await until(lambda: (Role.WEIGHT, "ghost") in members.current, "the one of the old history")
        await etcd.wipe()
        await other.put(KEYS.member("weight", "fresh"), member("fresh").encode())
        await write_some(other, 30)  # further on than the view was
        await until(lambda: {name for _, name in members.current} == {"fresh"}, "the new history only")


# -- pure ----------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, (1 << 48) - 1)), min_size=2))
def test_epochs_are_ordered_by_incarnation_first(pairs):
    epochs = [epoch_of(*pair) for pair in pairs]
    assert [epoch_of(*pair) for pair in sorted(pairs)] == sorted(epochs)
    assert [revision_of(epoch) for epoch in epochs] == [revision for _, revision in pairs]
    assert all(epoch < 1 << 63 for epoch in epochs)


@pytest.mark.parametrize("revision", [-1, 1 << 48, 2**62])
def test_what_can_be_no_revision_is_refused(revision):
    with pytest.raises(ValueError, match="no revision"):
        epoch_of(0, revision)


def header(revision, cluster=7):
    return pb.ResponseHeader(revision=revision, cluster_id=cluster)


def test_an_answer_older_than_one_that_came_before_its_question_contradicts():
    history = History()
    history.note(header(10), history.mark())
    early = history.mark()
    history.note(header(12), history.mark())
    history.note(header(11), early)  # asked before 12 was known: only late
    assert not history.take()
    history.note(header(11), history.mark())
    assert history.take() and history.contradictions == {"revision_went_back": 1}
    assert history.revision == 11 and not history.take()


def test_an_answer_of_the_former_history_does_not_count_in_the_next_one():
    history = History()
    history.note(header(100), history.mark())
    late = history.mark()
    history.note(header(5), history.mark())
    history.take()
    history.note(header(101), late)
    assert history.revision == 5
    history.note(header(6), history.mark())
    assert not history.take()


def test_another_etcd_cluster_contradicts_however_far_it_is():
    history = History()
    history.note(header(10), history.mark())
    history.note(header(99, cluster=8), history.mark())
    assert history.take() and history.contradictions == {"cluster_changed": 1}


def kv(name, revision, value=b""):
    return KeyValue(name, value, revision, revision, 1)


def snapshot(revision, *items):
    return Snapshot(revision, {item.key: item for item in items})


@pytest.mark.parametrize(
    "now, wrong",
    [
        (snapshot(10, kv("a", 4)), False),
        (snapshot(15, kv("a", 4), kv("b", 12)), False),
        (snapshot(15), False),  # deleted since, maybe
        (snapshot(15, kv("a", 14)), False),
        (snapshot(9, kv("a", 4)), True),
        (snapshot(15, kv("a", 3)), True),
        (snapshot(15, kv("a", 4), kv("b", 6)), True),
        (snapshot(15, kv("a", 4, b"other")), True),
    ],
)
def test_what_was_written_before_must_have_been_known(now, wrong):
    assert contradicts({"a": kv("a", 4)}, 10, now) is wrong
