"""What the weight supervisor says to attention nodes, over gRPC to nodes that are played."""

from __future__ import annotations

import asyncio
import itertools
import time
from contextlib import asynccontextmanager

import grpc
import pytest_asyncio
from flume_common.membership import Life, Member, Role, State
from flume_common.serving import serve
from flume_protos.v1 import attention_pb2 as pb
from flume_protos.v1 import attention_pb2_grpc as rpc
from flume_protos.v1 import common_pb2
from flume_weight import attachments
from flume_weight import messages as m
from flume_weight.attachments import Attachments, detach
from flume_weight.identity import Identity
from msgspec.structs import replace

READY = m.Ready("llama", 100, 64, 2, 4, 2, 16, "float32", 16, 8, 4, 4096, 0.0)


class Node(rpc.AttentionServicer):
    """Answers Adopt with these replies, the last one from then on."""

    def __init__(self, *kept: pb.AdoptReply) -> None:
        self.kept = list(kept)
        self.name = ""  # empty: the one that is meant
        self.answers = asyncio.Event()
        self.answers.set()
        self.asked = []
        self.attaches = []
        self.detached = []
        self.lanes = []
        self.renewed = []
        self.refuses = False

    @property
    def attached(self):
        return len(self.attaches)

    async def Renew(self, request, context):
        if self.refuses:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "test: cannot verify")
        self.renewed.append(request)
        return pb.RenewReply(attached=request.weight_node in self.lanes)

    async def Attach(self, request, context):
        self.attaches.append(request)
        await self.answers.wait()
        self.lanes = [request.weight_node]
        return pb.AttachReply(
            node=self.name or request.node, epoch=9, worker_address=b"theirs", lane=3, capacity_blocks=10
        )

    async def Adopt(self, request, context):
        self.asked.append(request)
        return self.kept.pop(0) if len(self.kept) > 1 else self.kept[0]

    async def Detach(self, request, context):
        self.detached.append((request.weight_node, request.epoch))
        return pb.DetachReply()


@asynccontextmanager
async def listed(name, node):
    """The member of a node that serves."""
    add = lambda server: rpc.add_AttentionServicer_to_server(node, server)  # noqa: E731
    async with serve("127.0.0.1:0", add, ["flume.v1.Attention"], grace_s=0) as server:
        yield member(name, server.address)


class Listing:
    """Members as they are seen in etcd: these attention nodes, and below which epoch `w1` is over."""

    def __init__(self, *nodes, over_below=0):
        self.nodes = list(nodes)
        self.below = over_below

    def of(self, role):
        assert role is Role.ATTENTION
        return self.nodes

    def over_below(self, role, id):
        assert (role, id) == (Role.WEIGHT, "w1")
        return self.below


def member(name, address):
    return Member(
        id=name, role=Role.ATTENTION, state=State.READY, address=address, host="h", pid=1, version="0",
        protocol_version=1, started_at_s=0.0,
    )  # fmt: skip


@pytest_asyncio.fixture
async def ours(monkeypatch):
    monkeypatch.setattr(attachments, "_KEPT_TIMEOUT_S", 0.6)
    return attachments_of(lambda: identity(8))


def identity(epoch, number=1, ordinal=0, *, registered=True):
    """Ours, in the registration of that number."""
    return Identity("w2", Life(epoch, 7, f"i{ordinal}", ordinal, number), b"secret", registered)


def attachments_of(identity):
    """`said` is what the engine is told, but for the lanes it opens at once when it is asked."""
    said, numbers, loop = [], itertools.count(1), asyncio.get_running_loop()

    def engine(message):
        if isinstance(message, m.OpenLane):
            loop.call_soon(lambda: made.opened(m.LaneOpen(next(numbers), b"ours")))
        else:
            said.append(message)

    made = Attachments(READY, engine, identity)
    made.said = said
    return made


async def test_a_lane_is_told_the_nodes_epoch(ours):
    async with listed("a", Node(pb.AdoptReply())) as one:
        await ours.reconcile([one])
    (attach,) = ours.said
    assert (attach.node, attach.epoch) == ("a", 9)


async def test_every_attempt_is_a_lane_of_its_own_and_one_in_vain_is_closed(ours):
    """Whoever did not get our answer may send something all the same."""
    node = Node(pb.AdoptReply())
    async with listed("a", node) as one:
        await ours.reconcile([member("dead", "127.0.0.1:1"), one])
        lanes = {message.receive_lane for message in ours.said if isinstance(message, m.Attach)}
        closed = {message.lane for message in ours.said if isinstance(message, m.CloseLane)}
        assert len(lanes) == len(closed) == 1 and lanes | closed == {1, 2}
        assert [(request.lane, request.worker_address) for request in node.attaches] == [(*lanes, b"ours")]


async def test_an_engine_in_a_long_step_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(attachments, "_ATTACH_TIMEOUT_S", 0.05)
    said = []
    ours = Attachments(READY, said.append, lambda: identity(8))
    node = Node(pb.AdoptReply())
    async with listed("a", node) as one, asyncio.timeout(3):
        await ours.reconcile([one])
        assert node.attached == 0
        ours.opened(m.LaneOpen(1, b"ours"))
        await ours.reconcile([one])
        assert node.attached == 1 and ours.up == ["a"]


async def test_a_node_in_a_long_step_has_not_failed_and_is_asked_again_at_once(ours):
    node = Node(pb.AdoptReply(ranges=[pb.HeldRange(start=0, tokens=5)]))
    busy = [True] * 3

    async def attach(request, context):
        if busy:
            busy.pop()
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the engine answers long steps")
        return pb.AttachReply(node="a", epoch=9, worker_address=b"theirs", lane=3, capacity_blocks=10)

    node.Attach = attach
    async with listed("a", node) as one:
        asked = asyncio.create_task(ours.kept("s", "w1", Listing(one)))
        began_s = time.monotonic()
        while not ours.up:
            await ours.reconcile([one])
            await asyncio.sleep(0.01)
        assert time.monotonic() - began_s < 1.0, "no longer and longer pauses"
        assert await asked == [m.KeptRange("a", 0, 5)], "it was being attached all the while"


async def test_every_node_is_asked_until_it_has_noticed_that_the_other_weight_node_is_gone(ours):
    kept = pb.AdoptReply(ranges=[pb.HeldRange(start=0, tokens=5), pb.HeldRange(start=9, tokens=2)])
    slow = Node(pb.AdoptReply(in_use=True), pb.AdoptReply(in_use=True), kept)
    async with listed("a", slow) as one, listed("b", Node(pb.AdoptReply())) as other:
        await ours.reconcile([one, other])
        found = await ours.kept("s", "w1", Listing(one, other, over_below=7))
    assert found == [m.KeptRange("a", 0, 5), m.KeptRange("a", 9, 2)]
    asked = pb.AdoptRequest(
        weight_node="w2", epoch=8, sequence="s", lost_node="w1", lost_below=7,
        credentials=common_pb2.Credentials(incarnation="i0", secret=b"secret"),
    )  # fmt: skip
    assert slow.asked == [asked] * 3


async def test_a_node_that_cannot_be_reached_is_not_waited_for(ours):
    kept = pb.AdoptReply(ranges=[pb.HeldRange(start=0, tokens=5)])
    async with listed("a", Node(kept)) as one:
        members = [one, member("dead", "127.0.0.1:1")]
        await ours.reconcile(members)
        started = time.monotonic()
        found = await ours.kept("s", "w1", Listing(*members))
        assert time.monotonic() - started < 0.5
    assert found == [m.KeptRange("a", 0, 5)]
    async with asyncio.timeout(3):
        assert await ours.kept("s", "w1", Listing(*members)) == [], "it has ended since"


async def test_a_node_that_is_being_attached_is_waited_for(ours):
    kept = pb.AdoptReply(ranges=[pb.HeldRange(start=0, tokens=5)])
    async with listed("a", Node(kept)) as one:
        asked = asyncio.create_task(ours.kept("s", "w1", Listing(one)))
        await asyncio.sleep(0.1)
        await ours.reconcile([one])
        assert await asked == [m.KeptRange("a", 0, 5)]


async def test_a_sequence_in_use_elsewhere_is_not_waited_for_without_end(ours):
    async with listed("a", Node(pb.AdoptReply(in_use=True))) as one:
        await ours.reconcile([one])
        async with asyncio.timeout(3):
            assert await ours.kept("s", "w1", Listing(one)) == []


async def test_the_other_weight_node_is_fenced_as_soon_as_etcd_says_that_its_epoch_is_over(ours):
    node = Node(pb.AdoptReply(in_use=True), pb.AdoptReply())
    async with listed("a", node) as one:
        await ours.reconcile([one])
        listing = Listing(one, over_below=5)
        asked = asyncio.create_task(ours.kept("s", "w1", listing))
        await asyncio.sleep(0)
        listing.below = 12
        await asked
    assert [request.lost_below for request in node.asked] == [5, 12] or node.asked[-1].lost_below == 12


async def test_a_lane_that_is_lost_at_once_time_and_again_is_set_up_ever_less_often(ours):
    async with listed("a", Node(pb.AdoptReply())) as one:
        began_s = time.monotonic()
        while time.monotonic() - began_s < 1:
            await ours.reconcile([one])
            ours.lost("a")
            await asyncio.sleep(0.01)
    assert len(ours.said) == 4, "after 0, 0.1, 0.3 and 0.8 s"


async def test_a_lane_that_was_there_for_a_while_is_set_up_again_at_once(ours, monkeypatch):
    monkeypatch.setattr(attachments, "_LASTS_S", 0.0)
    async with listed("a", Node(pb.AdoptReply())) as one:
        for _ in range(3):
            await ours.reconcile([one])
            ours.lost("a")
        assert len(ours.said) == 3


async def test_with_a_new_epoch_of_ours_a_node_that_ended_our_lane_is_attached_again():
    node, lives = Node(), [identity(8)]
    ours = attachments_of(lambda: lives[-1])
    said = ours.said
    async with listed("a", node) as one:
        await ours.reconcile([one])
        node.lanes = []
        await ours.reconcile([one])
        assert (node.attached, len(said)) == (1, 1), "nobody asks while nothing has happened to us"
        lives.append(identity(20, number=2))
        node.refuses = True
        node.lanes = ["w1", "w2"]
        await ours.reconcile([one])
        assert node.attached == 1 and ours.up == ["a"], "it cannot verify the epoch yet: asked again"
        node.refuses, node.lanes = False, ["w1"]
        await ours.reconcile([one])
        assert [type(message) for message in said] == [m.Attach, m.Detach, m.Attach]
        assert node.attached == 2 and ours.up == ["a"]
        await ours.reconcile([one])
        assert (node.attached, len(node.renewed)) == (2, 1), "it is there under the new epoch"


async def test_in_a_new_incarnation_a_lane_is_renewed_with_a_lower_epoch_and_stays():
    node, lives = Node(), [identity(44)]
    ours = attachments_of(lambda: lives[-1])
    async with listed("a", node) as one:
        await ours.reconcile([one])
        lives.append(identity(3, number=2, ordinal=1))
        for _ in range(3):
            await ours.reconcile([one])
    credentials = common_pb2.Credentials(incarnation="i1", secret=b"secret")
    assert node.renewed == [pb.RenewRequest(weight_node="w2", epoch=3, credentials=credentials)]
    assert [type(message) for message in ours.said] == [m.Attach] and ours.up == ["a"]


async def test_nodes_that_are_not_listed_in_a_new_incarnation_yet_keep_their_lanes(monkeypatch):
    monkeypatch.setattr(attachments, "_UNLISTED_GRACE_S", 0.0)
    lives = [identity(44)]
    ours = attachments_of(lambda: lives[-1])
    async with listed("a", Node()) as one:
        await ours.reconcile([one])
        lives.append(identity(44, registered=False))
        await ours.reconcile([])
        assert ours.up == ["a"], "we are not listed either"
        lives.append(identity(3, number=2, ordinal=1))
        for _ in range(2):
            await ours.reconcile([])
            await asyncio.sleep(0.01)
        assert ours.up == ["a"], "everybody has to register again"
        monkeypatch.setattr(attachments, "_NEW_INCARNATION_GRACE_S", 0.0)
        for _ in range(2):
            await asyncio.sleep(0.01)
            await ours.reconcile([])
        assert ours.up == [], "but not for ever"


async def test_a_node_that_answers_under_another_name_is_not_attached(ours):
    """A record that gives another node's address as its own."""
    node = Node()
    node.name = "real"
    async with listed("ghost", node) as one:
        await ours.reconcile([one])
    assert node.attaches[0].node == "ghost"
    assert [type(message) for message in ours.said] == [m.CloseLane] and ours.up == []


async def test_a_record_that_names_another_process_ends_no_lane_that_works(ours):
    async with listed("a", Node()) as one:
        await ours.reconcile([one])
        await ours.reconcile([replace(one, address="127.0.0.1:1")])
        assert ours.up == ["a"]
        assert [type(message) for message in ours.said] == [m.Attach, m.CloseLane]


async def test_a_process_that_answers_in_the_place_of_another_takes_its_lane(ours):
    async with listed("a", Node()) as one, listed("a", Node()) as successor:
        await ours.reconcile([one])
        await ours.reconcile([successor])
        await ours.reconcile([successor])
    assert [type(message) for message in ours.said] == [m.Attach, m.Attach] and ours.up == ["a"]


async def test_a_node_that_does_not_answer_holds_up_no_other_one(ours, monkeypatch):
    monkeypatch.setattr(attachments, "_PASS_S", 0.1)
    silent = Node()
    silent.answers = asyncio.Event()
    async with listed("silent", silent) as one, listed("b", Node()) as other, asyncio.timeout(2):
        await ours.reconcile([one])
        await ours.reconcile([one, other])
        assert ours.up == ["b"]
        silent.answers.set()
        while "silent" not in ours.up:
            await ours.reconcile([one, other])


async def test_leaving_tells_every_node_that_answers(ours):
    node = Node(pb.AdoptReply())
    async with listed("a", node) as one:
        await detach([member("dead", "127.0.0.1:1"), one], identity(8))
    assert node.detached == [("w2", 8)]
