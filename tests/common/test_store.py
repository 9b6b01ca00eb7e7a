"""The client against a real etcd: keys, transactions, leases."""

import asyncio
import time

import pytest
from flume_common.store import (
    Delete,
    DeletePrefix,
    Get,
    GetPrefix,
    LeaseLost,
    OutcomeUnknown,
    Put,
    StoreConfig,
    StoreRefused,
    StoreUnavailable,
    TxnTooLarge,
    absent,
    connect,
    create_revision,
    hold_lease,
    mod_revision,
    value,
    version,
)


@pytest.fixture
def prefix(keys):
    return keys.root


async def test_what_is_put_can_be_read_with_its_revisions(store, prefix):
    first = await store.put(prefix + "a", b"1")
    second = await store.put(prefix + "a", b"2")
    kv = await store.get(prefix + "a")
    assert (kv.value, kv.create_revision, kv.mod_revision, kv.version) == (b"2", first, second, 2)
    assert await store.get(prefix + "b") is None


async def test_a_range_holds_the_prefix_and_not_its_neighbours(store, prefix):
    for name in ("x/a", "x/b", "x", "xy/c", "x0"):
        await store.put(prefix + name, name.encode())
    found = await store.range(prefix + "x/")
    assert set(found.items) == {prefix + "x/a", prefix + "x/b"}
    assert found.revision >= max(kv.mod_revision for kv in found.items.values())


async def test_a_prefix_without_its_slash_is_refused_before_it_is_sent(store):
    with pytest.raises(ValueError, match="must end in"):
        await store.range("/flume/v1/c")
    with pytest.raises(ValueError, match="must end in"):
        await store.delete_prefix("/flume/v1/c")


async def test_delete_says_what_was_there(store, prefix):
    for name in ("a/1", "a/2", "b"):
        await store.put(prefix + name, b"")
    assert await store.delete(prefix + "b") is True
    assert await store.delete(prefix + "b") is False
    assert await store.delete_prefix(prefix + "a/") == 2
    assert not (await store.range(prefix)).items


async def test_a_transaction_does_one_branch_and_tells_which(store, prefix):
    key = prefix + "k"
    made = await store.txn([absent(key)], [Put(key, b"1"), Get(key)], [Get(key)])
    assert made.succeeded
    assert made.results[0] is None
    assert made.kv(1).value == b"1"
    assert made.kv(1).mod_revision == made.revision
    again = await store.txn([absent(key)], [Put(key, b"2")], [Get(key)])
    assert not again.succeeded
    assert again.kv(0).value == b"1"


async def test_a_transaction_gives_each_operation_its_result(store, prefix):
    for name in ("d/1", "d/2", "e"):
        await store.put(prefix + name, b"v")
    result = await store.txn(
        [], [GetPrefix(prefix + "d/"), DeletePrefix(prefix + "d/"), Delete(prefix + "e"), Get(prefix + "f")]
    )
    found, *rest = result.results
    assert [kv.key for kv in found] == [prefix + "d/1", prefix + "d/2"]
    assert rest == [2, 1, None]


@pytest.mark.parametrize(
    "condition, holds",
    [
        (lambda k, kv: create_revision(k, kv.create_revision), True),
        (lambda k, kv: create_revision(k, kv.mod_revision), False),
        (lambda k, kv: mod_revision(k, kv.mod_revision), True),
        (lambda k, kv: mod_revision(k, kv.create_revision), False),
        (lambda k, kv: mod_revision(k, kv.mod_revision, "<"), False),
        (lambda k, kv: mod_revision(k, kv.create_revision, ">"), True),
        (lambda k, kv: version(k, 2), True),
        (lambda k, kv: version(k, 2, "!="), False),
        (lambda k, kv: value(k, b"2"), True),
        (lambda k, kv: value(k, b"1"), False),
        (lambda k, kv: absent(k), False),
        (lambda k, kv: absent(k + "-"), True),
        (lambda k, kv: mod_revision(k + "-", 0), True),
        (lambda k, kv: version(k + "-", 0), True),
    ],
)
async def test_conditions_mean_what_they_say(store, prefix, condition, holds):
    key = prefix + "k"
    await store.put(key, b"1")
    await store.put(key, b"2")
    kv = await store.get(key)
    assert (await store.txn([condition(key, kv)], [])).succeeded is holds


async def test_of_two_that_read_the_same_revision_only_one_writes(store, prefix):
    key = prefix + "counter"
    await store.put(key, b"0")

    async def add_one() -> None:
        while True:
            kv = await store.get(key)
            done = await store.txn(
                [mod_revision(key, kv.mod_revision)], [Put(key, b"%d" % (int(kv.value) + 1))]
            )
            if done.succeeded:
                return

    await asyncio.gather(*(add_one() for _ in range(8)))
    kv = await store.get(key)
    assert kv.value == b"8"
    assert kv.version == 9
    assert store.txn_conflicts > 0


async def test_a_transaction_too_large_for_etcd_is_refused_before_it_is_sent(store, prefix):
    ops = [Put(f"{prefix}{number}", b"") for number in range(129)]
    with pytest.raises(TxnTooLarge, match="129") as caught:
        await store.txn([], ops)
    assert (caught.value.operations, caught.value.limit) == (129, 128)
    with pytest.raises(TxnTooLarge):
        await store.txn([absent(op.key) for op in ops], [])
    assert (await store.txn([], ops[:128])).succeeded


async def test_what_etcd_itself_refuses_is_told_with_its_words(store, prefix):
    with pytest.raises(StoreRefused, match="duplicate key"):
        await store.txn([], [Put(prefix + "a", b"1"), Put(prefix + "a", b"2")])
    assert store.connected


async def test_a_leased_key_lives_as_long_as_its_lease(store, prefix):
    lease = await store.grant(60)
    await store.put(prefix + "a", b"", lease.id)
    assert (await store.get(prefix + "a")).lease == lease.id
    assert 58 <= await store.time_to_live(lease.id) <= 60
    assert await store.keep_alive(lease.id) == 60
    await store.revoke(lease.id)
    assert await store.get(prefix + "a") is None


async def test_a_dead_lease_is_told_by_every_call_that_names_it(store, prefix):
    lease = await store.grant(60)
    await store.revoke(lease.id)
    with pytest.raises(LeaseLost) as caught:
        await store.keep_alive(lease.id)
    assert caught.value.lease == lease.id
    with pytest.raises(LeaseLost) as caught:
        await store.put(prefix + "a", b"", lease.id)
    assert caught.value.lease == lease.id
    with pytest.raises(LeaseLost) as caught:
        await store.txn([], [Put(prefix + "a", b"", lease.id)])
    assert caught.value.lease == lease.id
    assert await store.time_to_live(lease.id) is None
    await store.revoke(lease.id)


async def test_a_held_lease_outlives_its_ttl_and_a_blocked_loop_and_ends_with_its_block(store):
    async with hold_lease(store, 2) as lease:
        ttl_s = lease.ttl_s
        await asyncio.sleep(ttl_s * 0.7)
        time.sleep(ttl_s * 0.5)  # noqa: ASYNC251 - the point: somebody blocks the loop
        await asyncio.sleep(ttl_s * 0.5)
        assert await store.time_to_live(lease.id) is not None
        assert ttl_s * 0.5 < lease.remaining_s <= ttl_s
    assert await store.time_to_live(lease.id) is None
    assert store.lease_losses == 0


async def test_losing_a_held_lease_cancels_the_block_and_says_which(store):
    with pytest.raises(LeaseLost) as caught:
        async with hold_lease(store, 2) as lease:
            await store.revoke(lease.id)
            await asyncio.sleep(30)
    assert caught.value.lease == lease.id
    assert store.lease_losses == 1


async def test_a_loss_that_body_and_renewal_hear_of_at_once_is_raised_as_one(store):
    before = store.lease_losses
    with pytest.raises(LeaseLost):
        async with hold_lease(store, 2) as lease:
            await store.revoke(lease.id)
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:  # the renewal was told; so is this write
                await store.put("/late", b"", lease=lease.id)
    assert store.lease_losses == before + 1


async def test_a_write_without_an_answer_is_neither_repeated_nor_called_failed(
    etcd_endpoint, store, gate, keys
):
    async with gate(etcd_endpoint) as between:
        config = StoreConfig((between.address,), timeout_s=0.5)
        async with connect(config) as cut_off:
            await cut_off.put(keys.root + "warm", b"")
            between.muted = True
            with pytest.raises(OutcomeUnknown):
                await cut_off.put(keys.root + "a", b"1")
            with pytest.raises(OutcomeUnknown):
                await cut_off.txn([], [Put(keys.root + "b", b"1")])
            with pytest.raises(OutcomeUnknown):
                await cut_off.delete(keys.root + "warm")
            assert not cut_off.connected
    for name in ("a", "b"):
        assert (await store.get(keys.root + name)).version == 1
    assert await store.get(keys.root + "warm") is None


async def test_a_read_without_an_answer_changed_nothing_and_says_so_in_time(etcd_endpoint, gate, keys):
    async with (
        gate(etcd_endpoint) as between,
        connect(StoreConfig((between.address,), timeout_s=0.5)) as store,
    ):
        await store.get(keys.root + "a")
        between.stall()
        started_s = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await store.get(keys.root + "a")
        with pytest.raises(StoreUnavailable):
            await store.txn([], [Get(keys.root + "a")])
        assert time.monotonic() - started_s < 2


async def test_a_write_that_was_never_sent_is_sent_when_etcd_is_there(etcd_endpoint, gate, keys):
    async with gate(etcd_endpoint) as between, connect(StoreConfig((between.address,))) as store:
        await between.shut()
        writing = asyncio.create_task(store.put(keys.root + "a", b"1"))
        await asyncio.sleep(0.4)
        assert not writing.done()
        await between.open()
        assert await writing > 0
        assert (await store.get(keys.root + "a")).version == 1


async def test_nobody_there_is_told_with_the_address_and_in_time():
    async with connect(StoreConfig(("127.0.0.1:1",), timeout_s=0.5)) as store:
        started_s = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1"):
            await store.put("/a", b"")
        assert time.monotonic() - started_s < 1.5
        assert not store.connected


async def test_a_stopped_endpoint_costs_a_lease_less_than_half_of_its_time(etcd_endpoint, gate):
    async with gate(etcd_endpoint) as stopped:
        config = StoreConfig((stopped.address, etcd_endpoint))
        async with connect(config) as store, hold_lease(store, 3) as lease:
            for _ in range(2):
                await store.keep_alive(lease.id)
            while store.transport.link.address != stopped.address:
                store.transport.failed(store.transport.link, "test: go to the one that will stop")
            await store.keep_alive(lease.id)
            stopped.stall()
            lowest_s = lease.ttl_s
            for _ in range(25):
                await asyncio.sleep(0.1)
                lowest_s = min(lowest_s, lease.remaining_s)
            assert store.transport.link.address == etcd_endpoint
            assert lowest_s > lease.ttl_s * 0.4
            assert await store.get("/nothing") is None


async def test_hostnames_and_schemes_are_endpoints_too(etcd_endpoint, keys):
    port = etcd_endpoint.rpartition(":")[2]
    async with connect(StoreConfig.parse(f"http://localhost:{port}, http://127.0.0.1:{port}")) as store:
        assert await store.put(keys.root + "a", b"") > 0


async def test_status_names_version_and_leader(store, etcd_endpoint):
    status = await store.status()
    assert status.endpoint == etcd_endpoint
    assert status.version.startswith("3.")
    assert status.has_leader
    assert status.is_leader
    assert status.db_bytes > 0


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"endpoints": ()}, "no etcd endpoint"),
        ({"endpoints": ("localhost",)}, "'localhost' is not host:port"),
        ({"endpoints": ("ftp://a:1",)}, "not host:port"),
        ({"endpoints": ("http://a:1", "https://b:1")}, "mix https"),
        ({"endpoints": ("a:1",), "cert_file": "c.pem"}, "both cert_file and key_file"),
        ({"endpoints": ("a:1",), "user": "u"}, "go together"),
        ({"endpoints": ("a:1",), "timeout_s": 0}, "timeout_s"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_reason(settings, words):
    with pytest.raises(ValueError, match=words):
        StoreConfig(**settings)
