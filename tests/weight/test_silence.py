"""Who has not answered and for how long, without engines and without lanes."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
from flume_common.layout import KvLayout
from flume_common.wire import HEADER_WORDS, Credit
from flume_weight.errors import PeerSilent
from flume_weight.fleet import Fleet
from flume_weight.peer import Peer
from flume_weight.placement import Balance
from flume_weight.roster import Roster
from flume_weight.silence import Silence
from flume_weight.unanswered import Unanswered

LAYOUT = KvLayout(num_layers=1, num_query_heads=1, num_kv_heads=1, head_dim=8, dtype="float32")


def test_an_answer_is_for_the_plans_that_were_taken_when_it_was_sent():
    owed = Unanswered(10.0)
    owed.asked(11.0)
    assert owed.since_s == 10.0, "the lane begins with a CREDIT"
    owed.answered(0)
    assert owed.since_s == 11.0, "sent before the PLAN was in"
    owed.asked(12.0)
    owed.asked(13.0)
    owed.answered(2)
    assert owed.since_s == 13.0
    owed.answered(1)  # an older one changes nothing
    assert owed.since_s == 13.0
    owed.answered(3)
    assert owed.since_s is None
    owed.asked(20.0)
    assert owed.since_s == 20.0


def test_the_first_answer_may_be_one_to_plans():
    owed = Unanswered(10.0)
    owed.asked(11.0)
    owed.answered(1)
    assert owed.since_s is None


class Lane:
    """A lane that takes every PLAN, or loses it, and says what it is told to say."""

    def __init__(self):
        self.inbox, self.taken, self.loses = [], 0, False

    def sender(self, kind):
        return SimpleNamespace(frame=frame, send=self.send)

    def receiver(self, kind):
        return SimpleNamespace(
            poll=lambda: self.inbox.pop(0) if self.inbox else None, give_back=lambda frame: None
        )

    def send(self, frame, size):
        self.taken += not self.loses

    def answer(self):
        """CREDIT, as a node gives it when it has taken what has come so far."""
        said = frame()
        Credit(4, 8, 4, False, 0, plans_taken=self.taken).encode(said.words)
        self.inbox.append(said)


def frame():
    return SimpleNamespace(header=np.zeros(HEADER_WORDS, np.int64), words=np.zeros(4096, np.int64))


@pytest.fixture
def lane():
    return Lane()


@pytest.fixture
def peer(lane):
    """Whose lane has begun."""
    made = Peer("a", lane, 8)
    lane.answer()
    made.hear()
    return made


@pytest.fixture
def silence(peer):
    fleet = Fleet(LAYOUT, Balance(8), "weight")
    fleet.peers["a"] = peer
    return Silence(fleet, Roster(fleet, LAYOUT.block_tokens))


def tell(peer, want=0):
    peer.want_blocks = want
    peer.send_plan(peer.plan_frame(), 1, 1, [], 0)


def test_a_node_that_takes_its_plans_is_never_overdue(silence, peer, lane):
    for _ in range(3):
        peer.adopt(0, 5, 7)
        tell(peer)
        assert peer.owes_since_s is not None
        lane.answer()
        peer.hear()
        assert peer.owes_since_s is None
    assert silence.overdue(0.0) == [] and silence.next_look_s(1.0) == float("inf")


@pytest.mark.parametrize(
    "ask",
    [lambda peer: peer.adopt(0, 5, 7), lambda peer: peer.take(0, 5, 7), lambda peer: peer.tell_anew()],
    ids=["ADOPT", "TAKE", "credit wanted"],
)
def test_a_plan_that_never_arrives_makes_its_node_overdue_whatever_else_comes(silence, peer, lane, ask):
    lane.loses = True
    ask(peer)
    began_s = time.monotonic()
    tell(peer, want=3)
    lane.answer()  # about something else
    assert peer.hear()
    assert began_s <= peer.owes_since_s <= time.monotonic()
    assert silence.overdue(60.0) == []
    assert 59 < silence.next_look_s(60.0) <= 60
    (lost,) = silence.overdue(0.0)
    assert (lost.node, lost.reason) == ("a", "no answer within 0 s")


def test_a_lane_that_does_not_begin_makes_its_node_overdue(lane):
    fleet = Fleet(LAYOUT, Balance(8), "weight")
    fleet.peers["a"] = Peer("a", lane, 8)
    silence = Silence(fleet, Roster(fleet, LAYOUT.block_tokens))
    assert [lost.node for lost in silence.overdue(0.0)] == ["a"]
    lane.answer()
    fleet.hear()
    assert silence.overdue(0.0) == []


def test_a_node_that_left_a_step_waiting_is_overdue_from_then_on(silence, peer, lane):
    since_s = time.monotonic() - 5
    said = silence.set_aside(PeerSilent("a", since_s))
    assert (said.node, said.sequences) == ("a", 0)
    assert silence.overdue(6.0) == [] and [lost.node for lost in silence.overdue(4.0)] == ["a"]
    assert 0 < silence.next_look_s(6.0) <= 1
    lane.answer()
    peer.hear()
    assert silence.overdue(4.0) == []
