"""What canaries through weight nodes lead to: readiness, picks, metrics."""

import asyncio

import grpc
import httpx
import pytest
from flume_common.membership import Member, Role
from flume_protos.v1 import weight_pb2 as pb
from flume_router import canary
from flume_router.canary import Canary, Verdict, verdict_of

BODY = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hi"}]}
BROKEN = (pb.CANARY_FAILED, "no second token within 10 s: the engine is idle")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(canary, "_TICK_S", 0.02)
    monkeypatch.setattr(canary, "AGAIN_S", 0.05)


@pytest.fixture
async def often(store, keys):
    """An idle node is proved every 0.1 s."""
    await store.put(keys.setting("router", "canary_interval_s"), b"0.1")


async def ask(router):
    async with httpx.AsyncClient(timeout=10) as client:
        return await client.post(f"{router.http}/v1/chat/completions", json=BODY)


async def get(router, path):
    async with httpx.AsyncClient(timeout=10) as client:
        return await client.get(f"{router.http}{path}")


async def test_a_node_is_proved_when_it_appears_and_while_it_is_idle(
    start_router, start_weight, says, eventually, often
):
    async with start_weight("a", says("fine")) as a, start_router() as router:
        await eventually(lambda: a.num_canaries >= 3)
        page = (await get(router, "/metrics")).text
        assert 'flume_canary_success{weight_node="a"} 1.0' in page
        assert 'flume_canary_duration_seconds{weight_node="a"}' in page
        assert 'flume_canaries_total{verdict="failed",weight_node="a"} 0.0' in page
        assert (await get(router, "/readyz/canary")).status_code == 200
        assert a.requests == [], "a canary is no request"


async def test_tokens_of_requests_are_proof_enough(start_router, start_weight, says, store, keys):
    await store.put(keys.setting("router", "canary_interval_s"), b"0.3")
    async with start_weight("a", says([100] * 100, pause_s=0.02)) as a, start_router() as router:
        asking = asyncio.create_task(ask(router))
        await asyncio.sleep(0.2)
        before = a.num_canaries
        assert (await asking).status_code == 200
        assert a.num_canaries == before


async def test_a_node_whose_canary_fails_is_not_ready_and_is_used_again_when_it_works(
    start_router, start_weight, says, readiness, store, keys, often, until
):
    await store.put(keys.setting("cluster", "unavailable_wait_s"), b"0.3")
    async with start_weight("a", says("fine")) as a, start_router() as router:
        a.canary = BROKEN
        await readiness(router, 503)
        why = "the canary through a failed: no second token within 10 s"
        assert "[-]canary failed: a: no second token" in (await get(router, "/readyz")).text
        assert (await get(router, "/readyz/canary")).status_code == 503
        assert (await get(router, "/readyz/weight-node")).status_code == 200
        refused = await ask(router)
        assert refused.status_code == 503 and why in refused.text and a.requests == []
        assert 'flume_canary_success{weight_node="a"} 0.0' in (await get(router, "/metrics")).text

        async def said():
            return Member.decode(await store.get(keys.member(Role.ROUTER, "router-a"))).canary

        async def says_why():
            return (await said()).startswith("failed: a: no second token")

        await until(says_why)
        a.canary = (pb.CANARY_OK, "")
        await readiness(router, 200)
        assert (await ask(router)).status_code == 200

        async def says_nothing():
            return not await said()

        await until(says_nothing)


async def test_a_node_whose_canary_fails_is_left_for_one_whose_canary_does_not(
    start_router, start_weight, says, eventually, often
):
    async with (
        start_weight("a", says("a")) as a,
        start_weight("b", says("b")) as b,
        start_router() as router,
    ):
        a.canary = BROKEN
        before = a.num_canaries
        await eventually(lambda: a.num_canaries >= before + 2)
        assert (await get(router, "/readyz")).status_code == 200
        for _ in range(4):
            assert (await ask(router)).status_code == 200
        assert (len(a.requests), len(b.requests)) == (0, 4)


@pytest.mark.parametrize("shows", [(pb.CANARY_BUSY, "no room"), None], ids=["busy", "older version"])
async def test_a_node_that_is_busy_or_has_no_canary_is_used(
    start_router, start_weight, says, eventually, often, shows
):
    async with start_weight("a", says("fine"), canary=shows) as a, start_router() as router:
        await eventually(lambda: a.num_canaries >= 2)
        assert (await get(router, "/readyz")).status_code == 200
        assert (await ask(router)).status_code == 200


async def test_without_an_interval_there_are_no_canaries(start_router, start_weight, says, store, keys):
    await store.put(keys.setting("router", "canary_interval_s"), b"0")
    async with start_weight("a", says("fine")) as a, start_router():
        await asyncio.sleep(0.3)
        assert a.num_canaries == 0


class Stub:
    def __init__(self, verdict):
        self.verdict = verdict
        self.asked = 0

    async def Canary(self, request, *, timeout):
        self.asked += 1
        return pb.CanaryReply(verdict=self.verdict, reason="why")


async def test_what_a_node_says_of_itself_goes_before_its_canary():
    able, changes = [True], []
    made = Canary("a", interval_s=lambda: 60.0, able=lambda: able[0], changed=lambda: changes.append(1))
    stub = Stub(pb.CANARY_FAILED)
    running = asyncio.create_task(made.run(stub))
    await asyncio.sleep(0.03)
    assert made.failed and len(changes) == 1
    able[0] = False
    await asyncio.sleep(0.05)
    assert made.verdict is Verdict.UNKNOWN and len(changes) == 2
    stub.verdict, before = pb.CANARY_OK, stub.asked
    able[0] = True
    await asyncio.sleep(0.05)
    assert (made.verdict, stub.asked) == (Verdict.OK, before + 1), "asked at once, and not again"
    running.cancel()


@pytest.mark.parametrize(
    "code, verdict",
    [
        (grpc.StatusCode.UNIMPLEMENTED, Verdict.UNKNOWN),
        (grpc.StatusCode.UNAVAILABLE, Verdict.FAILED),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Verdict.FAILED),
        (grpc.StatusCode.INTERNAL, Verdict.UNKNOWN),
    ],
)
def test_what_a_call_that_fails_shows(code, verdict):
    error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "x")
    assert verdict_of(error)[0] is verdict


async def test_a_real_token_ends_a_failure():
    made = Canary("a", interval_s=lambda: 60.0, able=lambda: True, changed=lambda: None)
    running = asyncio.create_task(made.run(Stub(pb.CANARY_FAILED)))
    await asyncio.sleep(0.03)
    running.cancel()
    assert made.failed
    made.proved()
    assert not made.failed
