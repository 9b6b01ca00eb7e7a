"""Weight nodes come, go, fail and are replaced while clients notice as little as possible."""

import asyncio

import grpc
import httpx
import pytest
from flume_common.membership import State
from flume_protos.v1 import weight_pb2 as pb

BODY = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hi"}]}


async def ask(router, **changes):
    async with httpx.AsyncClient(timeout=10) as client:
        return await client.post(f"{router.http}/v1/chat/completions", json=BODY | changes)


def unavailable(after=0):
    async def script(request, context):
        for _ in range(after):
            yield pb.GenerateReply(token_ids=[100])
        await context.abort(grpc.StatusCode.UNAVAILABLE, "leaving")

    return script


async def test_requests_go_where_fewest_run(start_router, start_weight, says):
    slow = says([100] * 20, pause_s=0.05)
    async with start_weight("a", slow) as a, start_weight("b", slow) as b, start_router() as router:
        await settle(a, b)
        await asyncio.gather(*(ask(router) for _ in range(8)))
        assert (len(a.requests), len(b.requests)) == (4, 4)


async def settle(*fakes):
    """Until the router has met all of them."""
    async with asyncio.timeout(5):
        while not all(fake.num_described for fake in fakes):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unavailable_node_is_replaced_before_the_first_token(
    start_router, start_weight, says, stream
):
    async with (
        start_weight("a", unavailable()) as a,
        start_weight("b", unavailable()) as b,
        start_router() as router,
    ):
        await settle(a, b)
        b.script = says("fine")
        for _ in range(4):
            answer = await ask(router, stream=stream)
            assert answer.status_code == 200
            assert "fine" in answer.text
        assert len(b.requests) == 4
        assert len(a.requests) == 1  # then it is suspect, and b goes first


async def test_the_replacement_gets_the_same_request(start_router, start_weight, says):
    async with (
        start_weight("a", unavailable()) as a,
        start_weight("b", unavailable()) as b,
        start_router() as router,
    ):
        await settle(a, b)
        a.script, b.script = turns(unavailable(), says("fine"))
        assert (await ask(router, seed=5)).status_code == 200
        [first, second] = sorted((*a.requests, *b.requests), key=lambda request: request.adopt_from)
        assert second.adopt_from in "ab"
        second.adopt_from = ""
        assert first == second


def turns(*scripts):
    """For two nodes: whichever is asked next plays the next script."""
    remaining = list(scripts)

    async def script(request, context):
        async for reply in remaining.pop(0)(request, context):
            yield reply

    return script, script


async def test_nodes_that_all_fail_are_tried_so_often_and_no_more(start_router, start_weight):
    broken = unavailable()
    async with start_weight("a", broken) as a, start_weight("b", broken) as b, start_router() as router:
        await settle(a, b)
        answer = await ask(router)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert len(a.requests) + len(b.requests) == 6


async def test_a_process_that_is_gone_is_replaced(start_router, start_weight, says):
    async with start_weight("a", says("a")) as a, start_weight("b", says("b")) as b, start_router() as router:
        await settle(a, b)
        await a.server.grpc.stop(0)  # its lease still runs
        for _ in range(4):
            answer = await ask(router)
            assert answer.status_code == 200
            assert answer.json()["choices"][0]["message"]["content"] == "b"
        assert len(b.requests) == 4


async def test_without_a_weight_node_the_router_says_so(start_router):
    async with start_router(wait_ready=False) as router, httpx.AsyncClient() as client:
        answer = await ask(router)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["message"].startswith("no weight node serves smollm2-135m")
        health = await client.get(f"{router.http}/health")
        assert health.status_code == 503
        assert health.json()["message"].startswith("no weight node serves smollm2-135m")
        assert (await client.get(f"{router.http}/livez")).status_code == 200
        ready = await client.get(f"{router.http}/readyz")
        assert ready.status_code == 503
        assert ready.text == "[-]weight-node failed\n[+]canary ok\n[+]not-draining ok\nstore_connected: true"
        assert (await client.get(f"{router.http}/v1/models")).status_code == 200


async def test_a_wrong_request_is_refused_even_without_a_weight_node(start_router):
    async with start_router(wait_ready=False) as router:
        assert (await ask(router, model="gpt-5")).status_code == 404
        assert (await ask(router, messages=[])).status_code == 400


async def test_nodes_are_found_when_they_come_and_left_when_they_go(
    start_router, start_weight, says, readiness
):
    async with start_router(wait_ready=False) as router:
        async with start_weight("a", says("a")):
            await readiness(router, 200)
            assert (await ask(router)).status_code == 200
        await readiness(router, 503)
        async with start_weight("b", says("b")) as b:
            await readiness(router, 200)
            assert (await ask(router)).json()["choices"][0]["message"]["content"] == "b"
            await b.registration.update(state=State.DRAINING)
            await readiness(router, 503)


async def test_a_stream_outlives_its_nodes_membership(
    start_router, start_weight, says, readiness, eventually, monkeypatch
):
    monkeypatch.setattr("flume_router.weight_pool._LINGER_S", 0.05)
    async with start_weight("a", says([100] * 30, pause_s=0.05)) as a, start_router() as router:
        asking = asyncio.create_task(ask(router))
        await eventually(lambda: a.running == 1)
        await a.registration.update(state=State.DRAINING)
        await readiness(router, 503)
        assert (await asking).status_code == 200


async def test_a_node_whose_lease_was_lost_is_better_than_none(start_router, start_weight, says, readiness):
    async with start_weight("a", says("still here")) as a, start_router() as router:
        await a.registration.update(state=State.DRAINING)  # to the pool the same: no longer listed
        await readiness(router, 503)
        assert "still here" in (await ask(router)).text


@pytest.mark.parametrize("difference", [{"model": "llama"}, {"vocab_size": 1000}])
async def test_a_node_with_another_model_is_not_used(start_router, start_weight, says, difference):
    async with start_weight("a", says("a"), **difference) as a, start_router(wait_ready=False) as router:
        await settle(a)
        assert (await ask(router)).status_code == 503
        assert a.requests == []


async def test_a_node_that_cannot_answer_yet_is_asked_again(start_router, start_weight, says):
    async with start_weight("a", says("a"), not_yet=2) as a, start_router() as router:
        assert a.num_described == 3
        assert (await ask(router)).status_code == 200
