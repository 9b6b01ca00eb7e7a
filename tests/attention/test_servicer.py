"""The gRPC face over a fake supervisor: what it refuses itself, and how answers map."""

import time

import grpc
import msgspec
import pytest
import pytest_asyncio
from flume_attention import messages as m
from flume_attention.claims import Claim
from flume_attention.errors import AttachRefused, ClaimRefused, ClaimUnverified, EngineGone
from flume_attention.servicer import AttentionServicer, safe_to_delete, stats
from flume_common.epochs import epoch_of
from flume_common.layout import KvLayout
from flume_common.membership import State
from flume_common.serving import channel, serve
from flume_common.wire import PROTOCOL_VERSION
from flume_protos.v1 import attention_pb2 as pb
from flume_protos.v1 import attention_pb2_grpc as rpc
from flume_protos.v1 import common_pb2

LAYOUT = KvLayout(3, 4, 2, 16, "float32", 4)
HELD = m.LaneReport(
    weight_node="w1", epoch=3, granted_blocks=9, held_blocks=4, sequences=2, ranges=3, steps=7
)

IDLE = msgspec.structs.replace(HELD, granted_blocks=0, held_blocks=0, sequences=0, ranges=0)
PROMISED = msgspec.structs.replace(IDLE, granted_blocks=2)


class FakeSupervisor:
    """Answers every request with `answer`, or raises it."""

    state = State.READY

    def __init__(self):
        self.asked = []
        self.drains = []
        self.answer = m.Attached(request=1, worker_address=b"addr", lane=5, capacity_blocks=100)

    async def ask(self, make, kind):
        self.asked.append(make(1))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def attach(self, make):
        return await self.ask(make, m.Attached)

    async def set_draining(self, draining, *, leave_by_s=0.0):
        self.drains.append((draining, leave_by_s))


class FakeClaims:
    """Confirms everything, as epochs of the second incarnation, unless `error` is to be raised."""

    stale = 0

    def __init__(self):
        self.seen = []
        self.error = None

    async def require(self, claim, *, timeout_s):
        self.seen.append(claim)
        if self.error is not None:
            raise self.error
        return epoch_of(1, claim.epoch)

    async def over_below(self, weight_node, below, incarnation, *, timeout_s):
        return epoch_of(1, below) if below < 100 else 0


@pytest.fixture
def supervisor():
    return FakeSupervisor()


@pytest.fixture
def claims():
    return FakeClaims()


@pytest_asyncio.fixture
async def stub(supervisor, claims):
    servicer = AttentionServicer("a1", 1000, supervisor, lambda: 42)
    servicer.claims = claims
    add = lambda server: rpc.add_AttentionServicer_to_server(servicer, server)  # noqa: E731
    async with (
        serve("127.0.0.1:0", add, ["flume.v1.Attention"], grace_s=0) as server,
        channel(server.address) as c,
    ):
        yield rpc.AttentionStub(c)


def request(**changes):
    fields = {"weight_node": "w1", "epoch": 3, "protocol_version": PROTOCOL_VERSION} | {
        "layout": LAYOUT.to_proto(), "worker_address": b"theirs", "lane": 9,
        "max_step_tokens": 10, "max_step_sequences": 2, "kv_frame_bytes": 1 << 20,
    }  # fmt: skip
    return pb.AttachRequest(**(fields | changes))


async def test_an_attach_reaches_the_engine_whole_and_comes_back_with_our_epoch(stub, supervisor):
    reply = await stub.Attach(request(), timeout=5)
    assert (reply.node, reply.epoch, reply.lane, reply.worker_address) == ("a1", 42, 5, b"addr")
    (asked,) = supervisor.asked
    assert asked == m.Attach(
        request=1, weight_node="w1", epoch=epoch_of(1, 3), layout=LAYOUT, worker_address=b"theirs", lane=9,
        max_step_tokens=10, max_step_sequences=2, kv_frame_bytes=1 << 20, node_epoch=42,
    )  # fmt: skip


async def test_what_is_kept_of_a_sequence_is_asked_for_under_the_askers_epoch(stub, supervisor):
    supervisor.answer = m.Kept(request=1, ranges=[(0, 16), (40, 3)], in_use=False)
    asked = {"weight_node": "w2", "epoch": 8, "sequence": "s", "lost_node": "w1", "lost_below": 7}
    reply = await stub.Adopt(pb.AdoptRequest(**asked), timeout=5)
    assert [(item.start, item.tokens) for item in reply.ranges] == [(0, 16), (40, 3)]
    verified = asked | {"epoch": epoch_of(1, 8), "lost_below": epoch_of(1, 7)}
    assert supervisor.asked == [m.Adopt(request=1, **verified)]
    supervisor.answer = AttachRefused("epoch", "older")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.Adopt(pb.AdoptRequest(weight_node="w2", epoch=7, sequence="s"), timeout=5)
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_fence_that_is_not_confirmed_ends_no_lane_and_the_rest_is_answered(stub, supervisor):
    supervisor.answer = m.Kept(request=1, ranges=[], in_use=True)
    asked = {"weight_node": "w2", "epoch": 8, "sequence": "s", "lost_node": "w1", "lost_below": 2**40}
    assert (await stub.Adopt(pb.AdoptRequest(**asked), timeout=5)).in_use
    (engine_asked,) = supervisor.asked
    assert (engine_asked.lost_node, engine_asked.lost_below) == ("", 0)


CREDENTIALS = common_pb2.Credentials(incarnation="i", secret=b"s")
CLAIMING = {
    "Attach": lambda: request(weight_node="w", epoch=9, credentials=CREDENTIALS),
    "Renew": lambda: pb.RenewRequest(weight_node="w", epoch=9, credentials=CREDENTIALS),
    "Detach": lambda: pb.DetachRequest(weight_node="w", epoch=9, credentials=CREDENTIALS),
    "Adopt": lambda: pb.AdoptRequest(weight_node="w", epoch=9, sequence="s", credentials=CREDENTIALS),
    "Pull": lambda: pb.PullRequest(weight_node="w", epoch=9, credentials=CREDENTIALS),
}


@pytest.mark.parametrize("verb", CLAIMING)
@pytest.mark.parametrize(
    "error, code",
    [
        (ClaimRefused("never given out"), "FAILED_PRECONDITION"),
        (ClaimUnverified("cannot verify epoch 9 of w: etcd is away"), "UNAVAILABLE"),
    ],
)
async def test_no_message_with_an_epoch_reaches_the_engine_unverified(
    stub, supervisor, claims, verb, error, code
):
    claims.error = error
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await getattr(stub, verb)(CLAIMING[verb](), timeout=5)
    assert raised.value.code().name == code and raised.value.details() == str(error)
    assert claims.seen == [Claim("w", 9, "i", b"s")]
    assert supervisor.asked == []


async def test_a_renewal_says_whether_there_is_a_lane(stub, supervisor):
    for attached in (True, False):
        supervisor.answer = m.Renewed(request=1, attached=attached)
        assert (await stub.Renew(CLAIMING["Renew"](), timeout=5)).attached is attached
    assert supervisor.asked == [m.Renew(request=1, weight_node="w", epoch=epoch_of(1, 9))] * 2


async def test_before_a_node_has_registered_it_believes_nobody(stub, supervisor):
    servicer = AttentionServicer("a1", 1000, supervisor, lambda: 42)
    add = lambda server: rpc.add_AttentionServicer_to_server(servicer, server)  # noqa: E731
    async with (
        serve("127.0.0.1:0", add, ["flume.v1.Attention"], grace_s=0) as server,
        channel(server.address) as c,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await rpc.AttentionStub(c).Detach(CLAIMING["Detach"](), timeout=5)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE and supervisor.asked == []


def wrong_hash():
    layout = LAYOUT.to_proto()
    layout.hash = "0" * 16
    return layout


@pytest.mark.parametrize(
    "changes, answer, code, said",
    [
        ({"protocol_version": 99}, None, "FAILED_PRECONDITION", "protocol_version 99"),
        ({"protocol_version": 99, "layout": wrong_hash()}, None, "FAILED_PRECONDITION", "protocol_version"),
        ({"layout": wrong_hash()}, None, "FAILED_PRECONDITION", "differs in hash"),
        ({"layout": common_pb2.KvLayout()}, None, "INVALID_ARGUMENT", "dtype"),
        ({"weight_node": ""}, None, "INVALID_ARGUMENT", "weight_node is empty"),
        ({}, AttachRefused("epoch", "epoch 3 is older"), "FAILED_PRECONDITION", "epoch 3 is older"),
        ({}, EngineGone("not up yet"), "UNAVAILABLE", "not up yet"),
    ],
)
async def test_refusals_have_a_status_and_a_reason(stub, supervisor, changes, answer, code, said):
    supervisor.answer = answer or supervisor.answer
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.Attach(request(**changes), timeout=5)
    assert error.value.code().name == code and said in error.value.details()


async def test_a_drains_deadline_is_a_time_from_now(stub, supervisor):
    before_s = time.time()
    await stub.Drain(pb.DrainRequest(deadline_s=30), timeout=5)
    await stub.Drain(pb.DrainRequest(), timeout=5)
    await stub.Undrain(pb.UndrainRequest(), timeout=5)
    (draining, leave_by_s), *others = supervisor.drains
    assert draining and before_s + 30 <= leave_by_s <= time.time() + 30
    assert others == [(True, 0.0), (False, 0.0)]


@pytest.mark.parametrize("deadline_s", [-1.0, float("inf"), float("nan")])
async def test_a_deadline_that_is_no_time_is_refused(stub, supervisor, deadline_s):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.Drain(pb.DrainRequest(deadline_s=deadline_s), timeout=5)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT and not supervisor.drains


def test_stats_show_the_report():
    report = m.Report(capacity_tokens=400, used_tokens=33, capacity_blocks=100, used_blocks=9,
                      epoch_rejected=2, lanes=[HELD])  # fmt: skip
    reply = stats("a1", 1000, State.READY, report)
    assert (reply.capacity_tokens, reply.used_tokens, reply.capacity_blocks) == (400, 33, 100)
    assert (reply.used_blocks, reply.epoch_rejected, reply.kv_bytes) == (9, 2, 1000)
    (lane,) = reply.lanes
    assert (lane.weight_node, lane.epoch, lane.granted_blocks, lane.held_blocks) == ("w1", 3, 9, 4)
    assert (lane.sequences, lane.ranges, lane.steps) == (2, 3, 7) and reply.state == common_pb2.READY


@pytest.mark.parametrize(
    "state, report, safe",
    [
        (State.DRAINING, m.Report(), True),
        (State.READY, m.Report(), False),
        (State.DRAINING, m.Report(used_blocks=1), False),
        (State.DRAINING, m.Report(lanes=[HELD]), False),
        (State.DRAINING, m.Report(lanes=[IDLE, PROMISED]), False),
        (State.DRAINING, m.Report(lanes=[IDLE, IDLE]), True),
    ],
    ids=["drained", "not draining", "holds blocks", "holds a sequence", "promised blocks", "idle lanes"],
)
def test_only_a_draining_node_that_holds_and_promises_nothing_is_safe_to_delete(state, report, safe):
    assert safe_to_delete(state, report) is safe
