"""A cluster of three real etcds, one of which dies."""

import asyncio
import os
import signal
import time
from contextlib import AsyncExitStack, asynccontextmanager

from flume_common.etcd_binary import embedded_etcd, free_port
from flume_common.store import OutcomeUnknown, StoreConfig, connect, hold_lease
from flume_common.tasks import background

FAST = ["--unsafe-no-fsync", "--heartbeat-interval=50", "--election-timeout=300"]
PREFIX = "/flume/v1/c/"


@asynccontextmanager
async def three_etcds(tmp_path):
    peers = [free_port() for _ in range(3)]
    cluster = ",".join(f"n{number}=http://127.0.0.1:{port}" for number, port in enumerate(peers))
    async with AsyncExitStack() as stack:
        members = [
            embedded_etcd(
                tmp_path / str(number),
                name=f"n{number}",
                peer_port=port,
                args=[*FAST, "--initial-cluster", cluster],
                stop_s=0,
            )
            for number, port in enumerate(peers)
        ]
        # All at once: the first waits for a quorum.
        yield await asyncio.gather(*(stack.enter_async_context(member) for member in members))


async def leader_of(etcds):
    for etcd in etcds:
        async with connect(StoreConfig((etcd.endpoint,))) as store:
            if (await store.status()).is_leader:
                return etcd
    raise AssertionError("no leader")


async def test_the_leader_dies_and_writes_resume_the_lease_lives_and_the_watch_misses_nothing(tmp_path):
    async with three_etcds(tmp_path) as etcds:
        leader = await leader_of(etcds)
        endpoints = tuple(etcd.endpoint for etcd in etcds)
        async with (
            connect(StoreConfig(endpoints, timeout_s=2.0)) as store,
            connect(StoreConfig(endpoints, timeout_s=2.0)) as watcher,
            hold_lease(store, 3) as lease,
            watcher.watch(PREFIX) as watch,
        ):
            # Both talk to the one that will die.
            for client in (store, watcher):
                while client.transport.link.address != leader.endpoint:
                    client.transport.failed(client.transport.link, "test: to the leader")
            watch.close()

            seen: set[str] = set()

            async def follow() -> None:
                async for batch in watch:
                    seen.update(change.kv.key for change in batch.changes)

            acknowledged: dict[str, float] = {}

            async def write(key: str) -> None:
                try:
                    await store.put(key, b"")
                except OutcomeUnknown:
                    return  # it may be seen or not
                acknowledged[key] = time.monotonic()

            async with background(follow=follow()):
                async with asyncio.TaskGroup() as writes:
                    for number in range(150):
                        if number == 50:
                            os.kill(leader.pid, signal.SIGKILL)
                            killed_s = time.monotonic()
                        writes.create_task(write(f"{PREFIX}{number}"))
                        await asyncio.sleep(0.02)
                async with asyncio.timeout(10):
                    while not acknowledged.keys() <= seen:  # noqa: ASYNC110 - what the follower has
                        await asyncio.sleep(0.02)

            gap_s = min(at_s for at_s in acknowledged.values() if at_s > killed_s + 0.05) - killed_s
            print(f"writes resumed {gap_s:.2f} s after the leader died, {150 - len(acknowledged)} unknown")
            assert gap_s < 5
            assert f"{PREFIX}149" in acknowledged
            assert await store.time_to_live(lease.id) is not None
            assert store.lease_losses == 0
            assert not watcher.watch_resyncs


async def test_a_member_cut_off_from_the_others_is_left_for_one_that_is_not(tmp_path):
    """The member we talk to loses its peers: `hasleader` ends the watch there, and nothing is missed."""
    async with three_etcds(tmp_path) as etcds:
        leader = await leader_of(etcds)
        ours, other = [etcd for etcd in etcds if etcd is not leader]
        async with (
            connect(StoreConfig((ours.endpoint, leader.endpoint, other.endpoint), timeout_s=2.0)) as watcher,
            connect(StoreConfig((leader.endpoint,))) as store,
        ):
            while watcher.transport.link.address != ours.endpoint:
                watcher.transport.failed(watcher.transport.link, "test: to the one that will be alone")
            async with watcher.watch(PREFIX) as watch:
                await store.put(PREFIX + "before", b"")
                await anext(watch)
                # Alone: both others stop for a while, and one of them comes back first.
                for etcd in (leader, other):
                    os.kill(etcd.pid, signal.SIGSTOP)
                reading = asyncio.create_task(anext(watch))
                try:
                    started_s = time.monotonic()
                    async with asyncio.timeout(10):
                        while watcher.transport.link.address == ours.endpoint:  # noqa: ASYNC110
                            await asyncio.sleep(0.05)
                    assert time.monotonic() - started_s < 8
                finally:
                    for etcd in (leader, other):
                        os.kill(etcd.pid, signal.SIGCONT)
                async with connect(StoreConfig((leader.endpoint, other.endpoint))) as again:
                    await again.put(PREFIX + "after", b"")
                batch = await asyncio.wait_for(reading, 15)
                assert [change.kv.key for change in batch.changes] == [PREFIX + "after"]
