"""Routes in etcd: soon, newest last, under the owner's epoch and lease."""

import asyncio
import os
import time
from contextlib import asynccontextmanager

import pytest
from flume_common.membership import Member, Role, State, register
from flume_common.route_store import RouteWriter, decode_route, encode_route, watch_routes
from flume_common.routes import Route
from flume_common.store import KeyValue, StoreConfig, connect, create_revision, mod_revision


def owner(node="w0") -> Member:
    return Member(
        id=node, role=Role.WEIGHT, state=State.READY, address="a:1", host="h", pid=os.getpid(), version="0",
        protocol_version=1, started_at_s=time.time(),
    )  # fmt: skip


async def eventually(view, done, timeout_s=15.0):
    version = view.version
    async with asyncio.timeout(timeout_s):
        while not done():
            version = await view.wait_newer(version)


def test_a_route_is_json_that_people_can_read():
    route = Route.start("s", "w0", 7, "a0").move_tail(32, "a1")
    assert encode_route(route) == (
        b'{"sequence":"s","weight_node":"w0","epoch":7,'
        b'"ranges":[{"start":0,"end":32,"node":"a0"},{"start":32,"end":null,"node":"a1"}]}'
    )
    assert decode_route(KeyValue("k", encode_route(route), 1, 1, 1)) == route


async def test_a_route_is_seen_moves_and_ends(store, keys):
    async with (
        watch_routes(store, keys) as routes,
        register(store, keys, owner()) as registration,
        RouteWriter(store, keys, registration) as writer,
    ):
        route = Route.start("s/1", "w0", 0, "a0")
        writer.put(route)
        await eventually(routes, lambda: routes.current)
        assert routes.current["s/1"].epoch == registration.epoch
        writer.put(route.move_tail(100, "a1"))
        await eventually(routes, lambda: len(routes.current["s/1"].ranges) == 2)
        assert [r.sequence for r in routes.through("a0")] == ["s/1"]
        assert routes.through("a2") == []
        writer.end("s/1")
        await eventually(routes, lambda: not routes.current)
        await asyncio.wait_for(writer.settled(), 5)
        assert writer.pending == 0


async def test_many_changes_between_two_writes_are_one_write(store, keys):
    async with (
        watch_routes(store, keys) as routes,
        register(store, keys, owner()) as registration,
        RouteWriter(store, keys, registration) as writer,
    ):
        for number in range(300):
            route = Route.start(f"s{number}", "w0", 0, "a0")
            writer.put(route)
            writer.put(route.move_tail(16, "a1"))
        writer.end("s0")
        writer.end("never heard of")
        await eventually(routes, lambda: len(routes.current) == 299)
        assert all(len(route.ranges) == 2 for route in routes.current.values())
        stored = (await store.range(keys.routes)).items.values()
        assert {kv.version for kv in stored} == {1}
        assert len({kv.mod_revision for kv in stored}) == 3, "a hundred to a transaction"


async def test_routes_end_with_their_owner(store, keys):
    async with register(store, keys, owner()) as registration:
        async with RouteWriter(store, keys, registration) as writer, watch_routes(store, keys) as routes:
            writer.put(Route.start("s", "w0", 0, "a0"))
            await eventually(routes, lambda: routes.current)
        assert (await store.get(keys.route("s"))).lease == registration.lease
    assert await store.get(keys.route("s")) is None


async def test_after_a_lost_lease_every_route_comes_back_under_the_new_epoch(store, keys):
    async with (
        watch_routes(store, keys) as routes,
        register(store, keys, owner(), ttl_s=2) as registration,
        RouteWriter(store, keys, registration) as writer,
    ):
        for number in range(3):
            writer.put(Route.start(f"s{number}", "w0", 0, "a0"))
        await eventually(routes, lambda: len(routes.current) == 3)
        writer.end("s0")
        first = registration.epoch
        await store.revoke(registration.lease)
        await eventually(
            routes,
            lambda: (
                set(routes.current) == {"s1", "s2"}
                and all(route.epoch > first for route in routes.current.values())
            ),
        )
        assert routes.current["s1"].epoch == registration.epoch
        assert (await store.get(keys.route("s1"))).lease == registration.lease


async def test_a_replaced_owner_writes_nothing(store, keys):
    async with (
        register(store, keys, owner(), ttl_s=2) as registration,
        RouteWriter(store, keys, registration) as writer,
    ):
        # Somebody else is w0 now, and our registration does not know it yet.
        thief = await store.grant(60)
        await store.delete(registration.key)
        young = owner().__class__(**{**_fields(owner()), "started_at_s": time.time() + 100})
        await store.put(registration.key, young.encode(), thief.id)
        writer.put(Route.start("s", "w0", 0, "a0"))
        await asyncio.sleep(0.5)
        assert await store.get(keys.route("s")) is None
        assert writer.pending == 1 and writer.refused > 0 and writer.taken_over == 0


def _fields(member: Member) -> dict[str, object]:
    return {name: getattr(member, name) for name in member.__struct_fields__}


async def test_every_write_says_what_it_believes_to_replace_so_that_a_late_one_comes_to_nothing(
    store, keys, monkeypatch
):
    asked, real = [], store.txn

    async def recorded(compares, success, failure=()):
        result = await real(compares, success, failure)
        asked.append((set(compares), result.revision))
        return result

    async with register(store, keys, owner()) as registration:
        monkeypatch.setattr(store, "txn", recorded)
        async with RouteWriter(store, keys, registration) as writer:
            route, key = Route.start("s", "w0", 0, "a0"), keys.route("s")
            writer.put(route)
            await asyncio.wait_for(writer.settled(), 5)
            writer.put(route.move_tail(10, "a1"))
            await asyncio.wait_for(writer.settled(), 5)
            writer.end("s")
            await asyncio.wait_for(writer.settled(), 5)
        fence = create_revision(registration.key, registration.epoch)
        first, second, third = asked
        assert first[0] == {fence, mod_revision(key, 0)}
        assert second[0] == {fence, mod_revision(key, first[1])}
        assert third[0] == {fence, mod_revision(key, second[1])}


async def test_a_key_changed_by_a_late_write_is_read_again_and_put_right(store, keys):
    async with (
        register(store, keys, owner()) as registration,
        RouteWriter(store, keys, registration) as writer,
    ):
        route, key = Route.start("s", "w0", 0, "a0"), keys.route("s")
        writer.put(route)
        await asyncio.wait_for(writer.settled(), 5)
        await store.put(key, b"late", registration.lease)
        writer.put(route.move_tail(10, "a1"))
        await asyncio.wait_for(writer.settled(), 5)
        assert len(decode_route(await store.get(key)).ranges) == 2


async def test_a_write_whose_answer_comes_after_the_lease_was_lost_is_done_again(
    etcd_endpoint, store, keys, monkeypatch
):
    async with (
        connect(StoreConfig((etcd_endpoint,))) as own,
        register(store, keys, owner(), ttl_s=2) as registration,
        watch_routes(store, keys) as routes,
    ):
        real, first = own.txn, registration.epoch

        async def answered_late(compares, success, failure=()):
            result = await real(compares, success, failure)
            monkeypatch.setattr(own, "txn", real)
            await store.revoke(registration.lease)
            await registration.wait_registered(after=first)
            await asyncio.sleep(0.05)
            return result

        monkeypatch.setattr(own, "txn", answered_late)
        async with RouteWriter(own, keys, registration) as writer:
            writer.put(Route.start("s", "w0", 0, "a0"))
            await eventually(
                routes, lambda: any(r.epoch > first for r in routes.current.values()), timeout_s=5
            )


@pytest.mark.parametrize("fault", ["mute", "stall", "shut"])
async def test_no_write_is_lost_or_done_twice_when_etcd_goes_away(etcd_endpoint, store, gate, keys, fault):
    async with (
        gate(etcd_endpoint) as between,
        connect(StoreConfig((between.address,), timeout_s=0.6)) as cut_off,
        register(store, keys, owner()) as registration,
        RouteWriter(cut_off, keys, registration) as writer,
        watch_routes(store, keys) as routes,
    ):
        route = Route.start("s", "w0", 0, "a0")
        writer.put(route)
        await eventually(routes, lambda: routes.current)
        if fault == "mute":
            between.muted = True
        elif fault == "stall":
            between.stall()
        else:
            await between.shut()
        writer.put(route.move_tail(10, "a1"))
        writer.put(Route.start("other", "w0", 0, "a0"))
        await asyncio.sleep(1.5)
        assert writer.pending == 2
        if fault == "mute":
            # What a muted connection swallowed is lost to its client: it must get a new one.
            await between.shut()
        await between.open()
        await asyncio.wait_for(writer.settled(), 15)
        await eventually(routes, lambda: len(routes.current) == 2)
        assert len(routes.current["s"].ranges) == 2
        assert (await store.get(keys.route("s"))).version == 2
        assert (await store.get(keys.route("other"))).version == 1


async def test_all_routes_end_at_once_but_those_that_another_owner_took_over(store, keys):
    async with (
        register(store, keys, owner("w1")) as first,
        register(store, keys, owner("w2")) as second,
        RouteWriter(store, keys, first) as writer,
        RouteWriter(store, keys, second) as adopter,
    ):
        for sequence in ("s1", "s2", "s3"):
            writer.put(Route.start(sequence, "w1", 0, "a0"))
        await writer.settled()
        adopter.put(Route.start("s2", "w2", 0, "a0"))
        await adopter.settled()
        writer.end_all()
        await asyncio.wait_for(writer.settled(), 5)
        assert (await store.range(keys.routes)).items.keys() == {keys.route("s2")}


async def test_a_route_that_another_owner_took_over_is_theirs_from_then_on(store, keys):
    """A weight node that was stopped wakes up: another one serves the sequence now."""
    async with (
        watch_routes(store, keys) as routes,
        register(store, keys, owner("w1")) as first,
        register(store, keys, owner("w2")) as second,
        RouteWriter(store, keys, first) as stopped,
        RouteWriter(store, keys, second) as adopter,
    ):
        before = Route.start("s", "w1", 0, "a0")
        stopped.put(before)
        await stopped.settled()
        adopted = Route.start("s", "w2", 0, "a0").move_tail(9, "a1")
        adopter.put(adopted)
        await adopter.settled()
        stopped.put(before.move_tail(5, "a2"))
        await asyncio.wait_for(stopped.settled(), 5)
        stopped.put(before.move_tail(6, "a2"))
        assert stopped.pending == 0
        stopped.end("s")
        await asyncio.wait_for(stopped.settled(), 5)
        kv = await store.get(keys.route("s"))
        assert decode_route(kv).ranges == adopted.ranges and kv.version == 2
        stopped.put(before)  # a new life of the sequence, here: taken over in turn
        await eventually(routes, lambda: routes.current["s"].weight_node == "w1")
        adopter.put(adopted.move_tail(20, "a0"))
        await asyncio.wait_for(adopter.settled(), 5)
        adopter.end("s")
        await asyncio.wait_for(adopter.settled(), 5)
        assert decode_route(await store.get(keys.route("s"))).weight_node == "w1"
        assert (stopped.taken_over, adopter.taken_over) == (1, 1)


@asynccontextmanager
async def reconciling(store, keys, every_s=0.1):
    async with (
        register(store, keys, owner(), ttl_s=2) as registration,
        RouteWriter(store, keys, registration, reconcile_every_s=every_s) as writer,
    ):
        yield registration, writer


async def until(done, timeout_s=10.0):
    async with asyncio.timeout(timeout_s):
        while not await done():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_whatever_claims_to_be_ours_and_is_not_is_removed(store, keys):
    async with reconciling(store, keys) as (registration, writer):
        writer.put(Route.start("live", "w0", 0, "a0"))
        await asyncio.wait_for(writer.settled(), 5)
        other = (await store.grant(60)).id
        junk = {
            "by-hand": (encode_route(Route.start("by-hand", "w0", 1, "a0")), 0),
            "old-epoch": (encode_route(Route.start("old-epoch", "w0", 1, "a0")), registration.lease),
            "two-tails": (b'{"weight_node":"w0","ranges":[{"start":0},{"start":0}]}', other),
            "another-name": (encode_route(Route.start("live", "w0", 1, "a0")), other),
            "no-owner": (b"nonsense", 0),
            "ghost": (encode_route(Route.start("ghost", "w9", 1, "a0")), 0),
        }
        for name, (value, lease) in junk.items():
            await store.put(keys.route(name), value, lease)
        theirs = keys.route("theirs"), keys.route("unreadable")
        await store.put(theirs[0], encode_route(Route.start("theirs", "w1", 3, "a0")), other)
        await store.put(theirs[1], b"of a newer version", other)

        async def only_live():
            return set((await store.range(keys.routes)).items) == {keys.route("live"), *theirs}

        await until(only_live)
        assert writer.removed == len(junk)
        assert decode_route(await store.get(keys.route("live"))).epoch == registration.epoch


async def test_a_live_route_that_was_deleted_or_overwritten_is_written_again_and_an_ended_one_is_not(
    store, keys
):
    async with reconciling(store, keys) as (registration, writer):
        for name in ("deleted", "overwritten", "ended"):
            writer.put(Route.start(name, "w0", 0, "a0"))
        await asyncio.wait_for(writer.settled(), 5)
        writer.end("ended")
        await asyncio.wait_for(writer.settled(), 5)
        await store.delete(keys.route("deleted"))
        await store.put(keys.route("overwritten"), encode_route(Route.start("overwritten", "w0", 1, "a9")))

        async def as_before():
            stored = (await store.range(keys.routes)).items
            return set(stored) == {keys.route("deleted"), keys.route("overwritten")} and all(
                kv.lease == registration.lease and decode_route(kv).tail.node == "a0"
                for kv in stored.values()
            )

        await until(as_before)
        await asyncio.sleep(0.5)
        assert await as_before()


async def test_a_route_that_changes_while_all_are_read_is_left_to_the_writer(store, keys):
    async with reconciling(store, keys, every_s=0.001) as (_, writer):
        for number in range(300):
            name = f"s{number % 7}"
            writer.put(Route.start(name, "w0", 0, f"a{number}"))
            if number % 3 == 0:
                writer.end(name)
            await asyncio.sleep(0.005)
        for number in range(7):
            writer.end(f"s{number}")
        await asyncio.wait_for(writer.settled(), 5)
        assert (await store.range(keys.routes)).items == {}
        assert (writer.removed, writer.taken_over) == (0, 0)
