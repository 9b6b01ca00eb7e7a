"""etcd stops or dies: streams and new requests go on with the last known members."""

import asyncio
import os
import signal
from contextlib import AsyncExitStack

import httpx
import pytest
import pytest_asyncio
from flume_common.etcd_binary import embedded_etcd
from flume_common.membership import Role

BODY = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hi"}]}
ARGS = ["--unsafe-no-fsync"]


@pytest_asyncio.fixture
async def etcd(tmp_path):
    """One of our own, to be mistreated."""
    async with embedded_etcd(tmp_path, args=ARGS, stop_s=0) as running:
        yield running


@pytest.fixture
def etcd_endpoint(etcd):
    return etcd.endpoint


async def ask(router, **fields):
    async with httpx.AsyncClient(timeout=15) as client:
        answer = await client.post(f"{router.http}/v1/chat/completions", json=BODY | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


async def store_connected(router, expected):
    """Waits until the router says so; it is ready all the while."""
    async with asyncio.timeout(15), httpx.AsyncClient() as client:
        while True:
            ready = await client.get(f"{router.http}/readyz?verbose")
            assert ready.status_code == 200, ready.text
            if f"store_connected: {str(expected).lower()}" in ready.text:
                break
            await asyncio.sleep(0.05)
        metrics = await client.get(f"{router.http}/metrics")
        assert f"\nflume_store_connected {float(expected)}\n" in metrics.text


async def test_a_killed_etcd_ends_nothing(
    etcd, tmp_path, start_router, start_weight, says, store, keys, until, eventually
):
    async with (
        AsyncExitStack() as second_life,
        start_weight("a", says([100] * 40, pause_s=0.05)) as a,
        start_weight("b", says("fine")) as b,
        start_router("--lease-ttl-s", "2") as router,
    ):
        await eventually(lambda: a.num_described and b.num_described)
        streams = [asyncio.create_task(ask(router)) for _ in range(2)]
        await eventually(lambda: a.running == 1)
        etcd.process.kill()
        await etcd.process.wait()
        await store_connected(router, False)
        assert a.running == 1  # its stream goes on
        assert await ask(router) == "fine"
        assert "fine" in await asyncio.gather(*streams)
        await a.server.grpc.stop(0)  # now a is down, and nobody can tell the router
        for _ in range(3):
            assert await ask(router) == "fine"
        again = embedded_etcd(
            tmp_path, client_port=etcd.client_port, peer_port=etcd.peer_port, args=ARGS, stop_s=0
        )
        await second_life.enter_async_context(again)
        await store_connected(router, True)

        async def listed():
            return await store.get(keys.member(Role.ROUTER, "router-a")) is not None

        await until(listed)
        assert await ask(router) == "fine"
        assert not router.running.done()


async def test_no_request_fails_when_leases_run_out_with_a_stopped_etcd(
    etcd, start_router, start_weight, says
):
    async with start_weight("a", says("fine"), ttl_s=2.0) as a, start_router("--lease-ttl-s", "2") as router:
        epoch = a.registration.epoch
        os.kill(etcd.pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(3):
                while True:
                    assert await ask(router) == "fine"
                    await asyncio.sleep(0.1)
        except TimeoutError:
            pass
        finally:
            os.kill(etcd.pid, signal.SIGCONT)
        # It comes back with leases that have run out: for a moment there is no member at all.
        async with asyncio.timeout(10):
            while a.registration.epoch == epoch or not a.registration.registered:
                assert await ask(router) == "fine"
        for _ in range(20):
            assert await ask(router) == "fine"
