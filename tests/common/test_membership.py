"""Members under leases, on a real etcd that is stopped, cut off and restarted."""

import asyncio
import os
import signal
import time

import msgspec
import pytest
from flume_common.etcd_binary import embedded_etcd, free_port
from flume_common.keys import Keys
from flume_common.membership import Member, Role, State, register, watch_members
from flume_common.store import Added, Changed, Removed, StoreConfig, connect

FAST = ["--unsafe-no-fsync", "--heartbeat-interval=50", "--election-timeout=300"]


def member(node="w0", **fields) -> Member:
    values = {
        "id": node,
        "role": Role.WEIGHT,
        "state": State.PREPARING,
        "address": "127.0.0.1:7001",
        "host": "here",
        "pid": os.getpid(),
        "version": "0",
        "protocol_version": 1,
        "started_at_s": time.time(),
    }
    return Member(**{**values, **fields})


async def eventually(view, done, timeout_s=15.0):
    version = view.version
    async with asyncio.timeout(timeout_s):
        while not done():
            version = await view.wait_newer(version)


async def test_a_member_is_seen_while_its_block_runs_with_its_epoch(store, keys):
    async with watch_members(store, keys) as members:
        async with register(store, keys, member()) as registration:
            await eventually(members, lambda: members.current)
            seen = members.current[Role.WEIGHT, "w0"]
            assert seen == msgspec.structs.replace(registration.member, epoch=registration.epoch)
            assert seen.epoch == (await store.get(registration.key)).create_revision
        await eventually(members, lambda: not members.current)


async def test_the_view_lists_members_by_role_and_id(store, keys):
    async with (
        watch_members(store, keys) as members,
        register(store, keys, member("b", role=Role.ATTENTION)),
        register(store, keys, member("a", role=Role.ATTENTION)),
        register(store, keys, member("a", role=Role.ROUTER)),
    ):
        await eventually(members, lambda: len(members.current) == 3)
        assert [m.id for m in members.of(Role.ATTENTION)] == ["a", "b"]
        assert [m.id for m in members.of(Role.ROUTER)] == ["a"]
        assert members.of(Role.WEIGHT) == []


async def test_what_is_stored_is_json_for_people_and_without_the_epoch(store, keys):
    async with register(store, keys, member(kv_capacity_tokens=4096)) as registration:
        stored = msgspec.json.decode((await store.get(registration.key)).value)
    assert stored["state"] == "PREPARING"
    assert stored["kv_capacity_tokens"] == 4096
    assert "epoch" not in stored


async def test_updates_are_written_together_and_keep_the_epoch(store, keys):
    async with (
        watch_members(store, keys) as members,
        register(store, keys, member()) as registration,
    ):
        for used in range(50):
            await registration.update(kv_used_tokens=used)
        await registration.update(state=State.READY)
        await eventually(
            members, lambda: any(m.state is State.READY for m in members.current.values()), timeout_s=5
        )
        seen = members.current[Role.WEIGHT, "w0"]
        assert (seen.kv_used_tokens, seen.epoch) == (49, registration.epoch)
        assert (await store.get(registration.key)).version < 10


async def test_a_member_that_dies_without_a_word_is_gone_when_its_lease_is(store, keys):
    lease = await store.grant(2)
    await store.put(keys.member("weight", "w0"), member().encode(), lease.id)
    async with watch_members(store, keys) as members:
        assert len(members.current) == 1
        started_s = time.monotonic()
        await eventually(members, lambda: not members.current)
        assert time.monotonic() - started_s < lease.ttl_s + 2


async def test_a_key_that_holds_nonsense_or_anothers_value_hides_nobody(store, keys):
    await store.put(keys.member("weight", "good"), member("good").encode())
    await store.put(keys.member("weight", "odd"), member("good", kv_used_tokens=7).encode())
    await store.put(keys.member("weight", "worse"), b"\xff{")
    async with watch_members(store, keys) as members:
        assert [(m.id, m.kv_used_tokens) for m in members.current.values()] == [("good", 0)]
        await store.delete(keys.member("weight", "odd"))
        await store.put(keys.member("weight", "worse"), member("worse").encode())
        await eventually(members, lambda: len(members.current) == 2)
        assert {m.id for m in members.current.values()} == {"good", "worse"}


async def test_a_member_from_a_newer_version_with_more_fields_is_understood(store, keys):
    fields = {**msgspec.json.decode(member().encode()), "something_new": [1, 2]}
    await store.put(keys.member("weight", "w0"), msgspec.json.encode(fields))
    async with watch_members(store, keys) as members:
        assert members.current[Role.WEIGHT, "w0"].state is State.PREPARING


async def test_an_etcd_stopped_for_longer_than_the_lease_costs_a_new_epoch_and_nothing_else(tmp_path):
    keys = Keys("c")
    async with (
        embedded_etcd(tmp_path, args=FAST, stop_s=0) as etcd,
        connect(StoreConfig((etcd.endpoint,), timeout_s=1.0)) as store,
        watch_members(store, keys) as members,
        register(store, keys, member(), ttl_s=1) as registration,
    ):
        first = registration.epoch
        os.kill(etcd.pid, signal.SIGSTOP)
        try:
            for _ in range(20):  # the body works on all the while
                await asyncio.sleep(0.1)
            await registration.update(state=State.READY)
            assert members.current, "the last thing known stays"
            assert not store.connected
        finally:
            os.kill(etcd.pid, signal.SIGCONT)
        await asyncio.wait_for(registration.wait_registered(after=first), 10)
        await eventually(members, lambda: any(m.epoch > first for m in members.current.values()))
        assert members.current[Role.WEIGHT, "w0"].state is State.READY
        assert store.lease_losses == 1
        assert store.connected


async def test_an_etcd_restarted_within_the_lease_costs_nothing(tmp_path):
    keys = Keys("c")
    async with (
        embedded_etcd(tmp_path, args=FAST, stop_s=0) as etcd,
        connect(StoreConfig((etcd.endpoint,), timeout_s=1.0)) as store,
        watch_members(store, keys) as members,
        register(store, keys, member(), ttl_s=10) as registration,
    ):
        first = registration.epoch
        await etcd.stop(0)
        await registration.update(state=State.READY)
        ports = {"client_port": etcd.client_port, "peer_port": etcd.peer_port}
        async with embedded_etcd(tmp_path, args=FAST, stop_s=0, **ports):
            await eventually(members, lambda: any(m.state is State.READY for m in members.current.values()))
            assert registration.epoch == first
            assert store.lease_losses == 0


async def test_a_deleted_key_comes_back_under_a_new_epoch(store, keys):
    async with (
        watch_members(store, keys) as members,
        register(store, keys, member(), ttl_s=2) as registration,
    ):
        first = registration.epoch
        await store.delete(registration.key)
        await eventually(members, lambda: any(m.epoch > first for m in members.current.values()))
        assert store.lease_losses == 0


async def test_epochs_are_over_below_the_one_that_is_seen_or_below_the_next_one(store, keys):
    async with watch_members(store, keys) as members:
        over = lambda: members.over_below(Role.WEIGHT, "w0")  # noqa: E731
        async with register(store, keys, member(), ttl_s=2) as registration:
            first = registration.epoch
            await eventually(members, lambda: (Role.WEIGHT, "w0") in members.current)
            assert over() == first, "the one that lives is not over"
        await eventually(members, lambda: (Role.WEIGHT, "w0") not in members.current)
        gone_below = over()
        assert gone_below > first
        async with register(store, keys, member(), ttl_s=2) as registration:
            assert registration.epoch >= gone_below, "the next one is not over before it begins"


async def test_a_restarted_process_need_not_wait_for_its_predecessors_lease(store, keys):
    dead = await store.grant(60)
    old = member(started_at_s=time.time() - 100)
    await store.put(keys.member("weight", "w0"), old.encode(), dead.id)
    await store.put(keys.route("s1"), b"{}", dead.id)
    async with asyncio.timeout(5), register(store, keys, member()) as registration:
        assert (await store.get(registration.key)).lease == registration.lease != dead.id
        assert await store.get(keys.route("s1")) is None, "what the dead one held goes with it"


async def test_of_two_with_one_name_the_younger_stays_and_they_do_not_fight(store, keys):
    old, young = member(pid=1, started_at_s=100.0), member(pid=2, started_at_s=200.0)
    async with register(store, keys, old, ttl_s=2) as elder:
        async with register(store, keys, young, ttl_s=2) as junior, store.watch(keys.members) as watch:
            seen = []
            try:
                async with asyncio.timeout(2.5):
                    async for batch in watch:
                        seen += batch.changes
            except TimeoutError:
                pass
            assert [c for c in seen if isinstance(c, Added | Removed | Changed)] == []
            assert junior.registered
            assert not elder.registered
        # Once the name is free the elder may have it back.
        await asyncio.wait_for(elder.wait_registered(after=junior.epoch), 10)


async def test_an_error_of_the_body_is_the_bodys_error_and_the_member_leaves(store, keys):
    with pytest.raises(KeyError, match="mine"):
        async with register(store, keys, member()):
            raise KeyError("mine")
    assert not (await store.range(keys.members)).items


async def test_registering_waits_for_an_etcd_that_is_not_there_yet(tmp_path):
    port, keys = free_port(), Keys("c")
    async with connect(StoreConfig((f"127.0.0.1:{port}",), timeout_s=0.5)) as store:

        async def be_member():
            async with register(store, keys, member()) as registration:
                return registration.epoch

        waiting = asyncio.create_task(be_member())
        await asyncio.sleep(0.6)
        assert not waiting.done()
        async with embedded_etcd(tmp_path, client_port=port, args=FAST, stop_s=0):
            assert await asyncio.wait_for(waiting, 10) > 0
