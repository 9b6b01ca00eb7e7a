from dataclasses import replace

import pytest
from flume_common.membership import Member, Role, State
from flume_controller.observe import Held, Patience, free_ids, observe
from flume_controller.plan import NodeView, Phase
from flume_controller.providers.base import Instance
from flume_controller.reach import Reach

NOW_S = 1000.0
PATIENCE = Patience(start_s=100, lost_s=30)


def member(id, state=State.READY, used=0, sequences=0):
    return Member(
        id=id,
        role=Role.ATTENTION,
        state=state,
        address="127.0.0.1:1",
        host="here",
        pid=1,
        version="0",
        protocol_version=1,
        started_at_s=0,
        kv_used_tokens=used,
        sequences=sequences,
    )


def process(id, age_s=1.0, **changes):
    return replace(Instance(id, pid=1, started_at_s=NOW_S - age_s), **changes)


def phase_of(members=(), instances=(), last_seen_s=None):
    views = observe(members, instances, {}, last_seen_s or {}, NOW_S, PATIENCE)
    return [view.phase for view in views]


@pytest.mark.parametrize("state", State)
def test_a_registered_node_is_what_it_says_it_is(state):
    assert phase_of([member("a", state)], [process("a")]) == [Phase[state]]


def test_a_process_counts_as_starting_until_it_registers():
    assert phase_of(instances=[process("a", age_s=99)]) == [Phase.STARTING]


def test_a_process_that_never_registers_is_stuck():
    assert phase_of(instances=[process("a", age_s=100)]) == [Phase.STUCK]


def test_a_node_whose_registration_lapsed_is_lost_and_later_stuck():
    old = process("a", age_s=500)
    assert phase_of(instances=[old], last_seen_s={"a": NOW_S - 29}) == [Phase.LOST]
    assert phase_of(instances=[old], last_seen_s={"a": NOW_S - 30}) == [Phase.STUCK]


def test_a_young_process_keeps_its_time_to_start_even_if_it_was_taken_for_a_registered_one():
    young = process("a", age_s=50)
    assert phase_of(instances=[young], last_seen_s={"a": NOW_S - 40}) == [Phase.LOST]


def test_a_process_told_to_end_is_stopping_registered_or_not():
    told = process("a", stopping=True)
    assert phase_of([member("a")], [told]) == [Phase.STOPPING]
    assert phase_of(instances=[told]) == [Phase.STOPPING]


def test_a_process_that_ended_is_dead_while_its_registration_lingers_and_then_nothing():
    ended = process("a", running=False)
    assert phase_of([member("a")], [ended]) == [Phase.DEAD]
    assert phase_of(instances=[ended]) == []


def test_a_node_of_others_is_seen_and_not_managed():
    (view,) = observe([member("a")], [], {}, {}, NOW_S, PATIENCE)
    assert view == NodeView("a", Phase.READY, managed=False)


@pytest.mark.parametrize(
    "state, reach, phase, reached, replaceable",
    [
        (State.READY, Reach.YES, Phase.READY, True, False),
        (State.READY, Reach.JOINING, Phase.PREPARING, False, False),
        (State.READY, Reach.NO, Phase.UNREACHABLE, False, False),
        (State.READY, Reach.OVERDUE, Phase.UNREACHABLE, False, True),
        (State.PREPARING, Reach.OVERDUE, Phase.PREPARING, False, False),
        (State.DRAINING, Reach.NO, Phase.DRAINING, False, False),
    ],
)
def test_a_node_is_ready_only_as_far_as_it_is_reached(state, reach, phase, reached, replaceable):
    (view,) = observe([member("a", state)], [process("a")], {}, {}, NOW_S, PATIENCE, {"a": reach})
    assert (view.phase, view.reached, view.replaceable) == (phase, reached, replaceable)


def test_the_reach_of_a_process_that_ended_or_was_told_to_end_does_not_matter():
    for changes, phase in (({"running": False}, Phase.DEAD), ({"stopping": True}, Phase.STOPPING)):
        views = observe([member("a")], [process("a", **changes)], {}, {}, NOW_S, PATIENCE, {"a": Reach.NO})
        assert [view.phase for view in views] == [phase]


def test_what_a_node_answers_counts_before_what_its_record_says():
    held = {"a": Held(used_tokens=7, sequences=1, safe_to_delete=True)}
    (view,) = observe([member("a", used=5)], [], held, {}, NOW_S, PATIENCE)
    assert (view.held_tokens, view.safe_to_delete) == (7, True)


def test_a_node_that_is_slow_to_answer_is_never_called_empty():
    (view,) = observe([member("a", State.DRAINING)], [], {}, {}, NOW_S, PATIENCE)
    assert not view.safe_to_delete


@pytest.mark.parametrize(
    "state, used, sequences, empty",
    [
        (State.DRAINING, 0, 0, True),
        (State.DRAINING, 1, 0, False),
        (State.DRAINING, 0, 1, False),
        (State.READY, 0, 0, False),
    ],
)
def test_the_record_of_a_node_that_is_gone_says_whether_it_was_empty(state, used, sequences, empty):
    assert Held.of_member(member("a", state, used, sequences)).safe_to_delete is empty


def test_ids_are_the_lowest_free_numbers():
    assert free_ids(3, ["attention-1", "attention-3", "other"]) == [
        "attention-2",
        "attention-4",
        "attention-5",
    ]
    assert free_ids(0, []) == []
