"""Which attention nodes count as reached, from what weight nodes say of their lanes."""

import pytest
from flume_common.membership import Member, Role, State
from flume_controller.reach import Answer, Evidence, Reach, ReachMemory, ReachPatience

PATIENCE = ReachPatience(joining_s=10, replace_s=60)
NOTHING = Evidence()


def weight(id, lanes, state=State.READY):
    """Lanes are letters; None: it does not say."""
    return Member(
        id=id, role=Role.WEIGHT, state=state, address="x:1", host="h", pid=1, version="0", protocol_version=1,
        started_at_s=0, lanes=None if lanes is None else tuple(lanes),
    )  # fmt: skip


def evidence(*lanes):
    return Evidence.of([weight(f"w{number}", item) for number, item in enumerate(lanes)], {})


@pytest.mark.parametrize(
    "weights, answers, expected",
    [
        ([], {}, (None, None)),
        ([weight("w1", "a")], {}, (True, False)),
        ([weight("w1", "a"), weight("w2", "b")], {}, (True, True)),
        ([weight("w1", "")], {}, (False, False)),
        ([weight("w1", "", State.PREPARING)], {}, (False, False)),
        ([weight("w1", None, State.PREPARING)], {}, (None, None)),
        ([weight("w1", "a"), weight("w2", None, State.PREPARING)], {}, (True, False)),
        ([weight("w1", "a"), weight("w2", None)], {}, (True, None)),
        ([weight("w1", "a")], {"w1": Answer.SILENT}, (True, False)),
        ([weight("w1", "a")], {"w1": Answer.REFUSED}, (None, None)),
        ([weight("w1", "a"), weight("w2", "b")], {"w2": Answer.OTHER}, (True, False)),
    ],
    ids=[
        "no weight node",
        "a lane to one",
        "each has a lane",
        "no lane at all",
        "no lane, and it says so",
        "one that loads knows nothing yet",
        "nor does it make others doubted",
        "one of an older version may have any lane",
        "slow is not dead",
        "what nothing answers for is no evidence",
        "nor what another node answers for",
    ],
)
def test_lanes_are_evidence(weights, answers, expected):
    made = Evidence.of(weights, answers)
    assert (made.reaches("a"), made.reaches("b")) == expected


def looks(memory, *steps):
    """Each step: (time, evidence, answer of node a); what each look says of it."""
    return [memory.look(["a"], made, {"a": answer} if answer else {}, at)["a"] for at, made, answer in steps]


def test_a_node_that_joins_becomes_ready_with_its_first_lane():
    found = looks(ReachMemory(PATIENCE), (0, evidence(""), None), (1, evidence("a"), None))
    assert found == [Reach.JOINING, Reach.YES]


def test_a_node_that_gets_no_lane_is_unreachable_and_after_long_overdue():
    steps = [(at, evidence("b"), Answer.YES) for at in (0, 9, 10, 59, 60, 999)]
    found = looks(ReachMemory(PATIENCE), *steps)
    assert found == [Reach.JOINING, Reach.JOINING, Reach.NO, Reach.NO, Reach.OVERDUE, Reach.OVERDUE]


def test_a_lane_that_is_lost_for_a_moment_is_not_missed():
    steps = [(0, evidence("a"), None), (5, evidence(""), None), (14, evidence(""), None)]
    assert looks(ReachMemory(PATIENCE), *steps) == [Reach.YES, Reach.YES, Reach.YES]
    steps += [(15, evidence(""), None), (75, evidence(""), None), (76, evidence("a"), None)]
    assert looks(ReachMemory(PATIENCE), *steps)[3:] == [Reach.NO, Reach.OVERDUE, Reach.YES]


def test_without_evidence_a_record_counts_and_the_wait_begins_anew():
    """No weight node is alive, or etcd is back and not all have registered again."""
    steps = [(0, evidence(""), None), (9, NOTHING, None), (12, evidence(""), None)]
    assert looks(ReachMemory(PATIENCE), *steps) == [Reach.JOINING, Reach.YES, Reach.JOINING]


@pytest.mark.parametrize("answer", [Answer.REFUSED, Answer.OTHER])
def test_without_evidence_a_record_at_whose_address_the_node_is_not_counts_for_nothing(answer):
    """And however long that lasts, it is no reason to replace it."""
    assert looks(ReachMemory(PATIENCE), (0, NOTHING, answer), (999, NOTHING, answer)) == [Reach.NO] * 2


def test_a_ghost_that_gives_the_address_of_another_node_is_known_at_once():
    assert looks(ReachMemory(PATIENCE), (0, evidence("b"), Answer.OTHER)) == [Reach.NO]


def test_a_lane_counts_more_than_a_supervisor_that_does_not_answer():
    assert looks(ReachMemory(PATIENCE), (0, evidence("a"), Answer.REFUSED)) == [Reach.YES]


def test_the_next_look_is_due_when_waiting_changes_something():
    memory = ReachMemory(PATIENCE)
    looks(memory, (0, evidence("a"), None))
    assert memory.next_change_s(0) is None
    looks(memory, (4, evidence(""), None))
    assert memory.next_change_s(4) == 10
    assert memory.next_change_s(20) == 44
    assert memory.next_change_s(99) is None
    memory.look([], NOTHING, {}, 100)
    assert memory.next_change_s(50) is None, "the node is gone"
