"""What a router does while no weight node can serve: it says why, and refuses soon."""

import asyncio
import time

import httpx
import pytest
from flume_common.membership import State
from flume_common.reasons import Reason

BODY = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hi"}]}
NO_LANE = {"state": State.PREPARING, "reason": Reason.NO_LANE}
READY = {"state": State.READY, "reason": ""}


async def ask(router):
    async with httpx.AsyncClient(timeout=10) as client:
        return await client.post(f"{router.http}/v1/chat/completions", json=BODY)


async def get(router, path):
    async with httpx.AsyncClient(timeout=10) as client:
        return await client.get(f"{router.http}{path}")


@pytest.fixture
async def short_wait(store, keys):
    """New requests wait for 0.5 s."""
    await store.put(keys.setting("cluster", "unavailable_wait_s"), b"0.5")


async def test_a_node_without_a_lane_gets_no_request_and_is_said_to_have_none(
    start_router, start_weight, says, readiness, short_wait
):
    async with start_weight("a", says("fine")) as a, start_router() as router:
        assert (await ask(router)).status_code == 200
        await a.registration.update(**NO_LANE)
        await readiness(router, 503)
        began_s = time.monotonic()
        refused = await ask(router)
        assert 0.4 < time.monotonic() - began_s < 3
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        why = "a has no lane to an attention node"
        assert f"no weight node can serve smollm2-135m at the moment: {why}" in refused.text
        assert f"[-]weight-node failed: {why}" in (await get(router, "/readyz")).text
        assert (await get(router, "/readyz/weight-node")).status_code == 503
        assert (await get(router, "/readyz/not-draining")).status_code == 200
        assert (await get(router, "/readyz/tea")).status_code == 404
        assert why in (await get(router, "/health")).json()["message"]
        assert len(a.requests) == 1
        await a.registration.update(**READY)
        await readiness(router, 200)
        assert (await ask(router)).status_code == 200


async def test_a_request_waits_a_moment_for_a_lane_to_come_back(start_router, start_weight, says, readiness):
    async with start_weight("a", says("fine")) as a, start_router() as router:
        await a.registration.update(**NO_LANE)
        await readiness(router, 503)
        asking = asyncio.create_task(ask(router))
        await asyncio.sleep(0.3)
        assert a.requests == []
        await a.registration.update(**READY)
        assert (await asking).status_code == 200


async def test_another_node_that_has_a_lane_is_asked(start_router, start_weight, says, short_wait):
    async with (
        start_weight("a", says("a")) as a,
        start_weight("b", says("b")) as b,
        start_router() as router,
    ):
        await a.registration.update(**NO_LANE)
        await asyncio.sleep(0.2)
        assert (await get(router, "/readyz")).status_code == 200
        for _ in range(3):
            assert (await ask(router)).status_code == 200
        assert (len(a.requests), len(b.requests)) == (0, 3)


async def test_a_stream_that_runs_goes_on_while_its_node_takes_no_more(
    start_router, start_weight, says, readiness, eventually, monkeypatch
):
    monkeypatch.setattr("flume_router.weight_pool._LINGER_S", 0.05)
    async with start_weight("a", says([100] * 30, pause_s=0.05)) as a, start_router() as router:
        asking = asyncio.create_task(ask(router))
        await eventually(lambda: a.running == 1)
        await a.registration.update(**NO_LANE)
        await readiness(router, 503)
        assert (await asking).status_code == 200
        await a.registration.update(**READY)
        await readiness(router, 200)
        assert a.num_described == 1, "its channel was kept"


async def test_a_node_that_answers_under_another_name_is_not_used(start_router, start_weight, says):
    """A record that gives another node's address as its own."""
    async with start_weight("a", says("a")) as a, start_weight("ghost", says("ghost")) as ghost:
        ghost.node = "real"
        async with start_router() as router:
            await asyncio.sleep(0.1)
            for _ in range(4):
                assert (await ask(router)).status_code == 200
            assert (len(a.requests), len(ghost.requests)) == (4, 0)
