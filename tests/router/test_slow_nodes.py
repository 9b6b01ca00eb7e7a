"""Weight nodes that work for long are waited for; those that stand still are left where there is another."""

import asyncio

import httpx
import pytest
from flume_common.membership import State
from flume_common.reasons import Reason
from structlog.testing import capture_logs

BODY = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hi"}]}


async def ask(router):
    async with httpx.AsyncClient(timeout=20) as client:
        return await client.post(f"{router.http}/v1/chat/completions", json=BODY)


@pytest.fixture
def slow(says):
    """A prompt that takes three times as long as a node may be silent."""
    return says([100] * 2, pause_s=1.8)


async def test_an_engine_in_a_long_step_is_waited_for_while_it_makes_progress(
    start_router, start_weight, slow, asks_often
):
    async with (
        start_weight("a", slow) as a,
        start_weight("b", slow) as b,
        start_router("--silence-s", "0.6") as router,
    ):
        a.quiet_s = b.quiet_s = 0.1
        with capture_logs() as logs:
            assert (await ask(router)).status_code == 200
        assert len(a.requests) + len(b.requests) == 1
        assert not [entry for entry in logs if entry["event"] == "weight_node_silent"]


async def test_an_engine_that_stands_still_is_left_though_its_supervisor_answers(
    start_router, start_weight, says, slow, asks_often, eventually
):
    async with start_weight("a", slow) as a, start_router("--silence-s", "0.6") as router:
        a.quiet_s = 5.0
        asking = asyncio.create_task(ask(router))
        await eventually(lambda: a.running == 1)
        async with start_weight("b", says([100] * 2)) as b:
            b.quiet_s = 0.0
            assert (await asking).status_code == 200
            assert [request.adopt_from for request in b.requests] == ["a"]
            assert len(a.requests) == 1


async def test_the_only_node_keeps_its_sequences_when_it_stands_still_and_ends_them_itself(
    start_router, start_weight, slow, asks_often
):
    """To send one again could only lose what the node has computed."""
    async with start_weight("a", slow) as a, start_router("--silence-s", "0.5") as router:
        a.quiet_s = 5.0
        with capture_logs() as logs:
            assert (await ask(router)).status_code == 200
        assert len(a.requests) == 1
        assert {entry["weight_node"] for entry in logs if entry["event"] == "weight_node_silent"} == {"a"}


async def test_the_only_node_is_given_up_in_time_without_another_attempt(
    start_router, start_weight, says, asks_often
):
    hangs = says([100], pause_s=60)
    async with (
        start_weight("a", hangs) as a,
        start_router("--silence-s", "0.5", "--resume-s", "1.5") as router,
    ):
        a.quiet_s = 5.0
        began_s = asyncio.get_running_loop().time()
        answer = await ask(router)
        assert answer.status_code == 503
        assert "no sign of work" in answer.json()["error"]["message"]
        assert len(a.requests) == 1
        assert 1.0 < asyncio.get_running_loop().time() - began_s < 6


async def test_a_node_that_starts_its_engine_again_is_waited_for_beyond_the_time_to_resume(
    start_router, start_weight, dies, asks_often, eventually
):
    script = dies("one two three four", 2)
    async with start_weight("a", script) as a, start_router("--resume-s", "0.5") as router:
        a.quiet_s = 0.0
        asking = asyncio.create_task(ask(router))
        await eventually(lambda: a.requests)
        await a.registration.update(state=State.PREPARING, reason=Reason.LOADING)
        a.quiet_s = 5.0
        a.silent.set()
        await asyncio.sleep(2.0)
        assert not asking.done() or (await asking).status_code == 200
        a.silent.clear()
        a.quiet_s = 0.0
        await a.registration.update(state=State.READY, reason="")
        answer = await asking
        assert answer.json()["choices"][0]["message"]["content"] == "one two three four"
