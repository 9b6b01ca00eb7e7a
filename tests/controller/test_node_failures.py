"""Events of engines that died and of models whose output is invalid, from what members count."""

import msgspec
import pytest
from flume_common.membership import Member, Role, State
from flume_controller.events import EventType
from flume_controller.node_failures import MODEL_EVERY_S, NodeFailures

NOW_S = 10_000.0
WEIGHT = Member(
    id="w", role=Role.WEIGHT, state=State.READY, address="a:1", host="h", pid=1, version="0",
    protocol_version=1, started_at_s=5.0, model="m",
)  # fmt: skip


def died(member, deaths, at_s=NOW_S):
    return msgspec.structs.replace(
        member, engine_deaths=deaths, last_engine_error=f"killed by {deaths}", last_engine_death_s=at_s
    )


@pytest.fixture
def failures():
    return NodeFailures()


def test_a_death_is_told_once_with_its_cause(failures):
    assert failures.look([WEIGHT], NOW_S) == []
    (told,) = failures.look([died(WEIGHT, 1)], NOW_S + 1)
    assert (told.object, told.type, told.reason) == ("weight/w", EventType.WARNING, "EngineDied")
    assert told.message == "its engine died: killed by 1; 1 since the node started"
    assert failures.look([died(WEIGHT, 1)], NOW_S + 2) == []
    (told,) = failures.look([died(WEIGHT, 4)], NOW_S + 3)
    assert told.message.startswith("3 engines died, the last one: killed by 4")


def test_a_node_that_was_away_meanwhile_is_remembered_and_a_new_process_counts_anew(failures):
    failures.look([died(WEIGHT, 2, at_s=0.0)], NOW_S)
    assert failures.look([], NOW_S + 1) == []
    assert len(failures.look([died(WEIGHT, 3)], NOW_S + 2)) == 1
    fresh = msgspec.structs.replace(WEIGHT, pid=2)
    assert failures.look([fresh], NOW_S + 3) == []
    assert len(failures.look([died(fresh, 1)], NOW_S + 4)) == 1


def test_a_new_leader_tells_of_a_fresh_death_and_not_of_old_ones(failures):
    assert failures.look([died(WEIGHT, 3, at_s=NOW_S - 1000)], NOW_S) == []
    attention = msgspec.structs.replace(WEIGHT, role=Role.ATTENTION, id="a")
    assert [told.object for told in failures.look([died(attention, 3, at_s=NOW_S - 5)], NOW_S)] == [
        "attention/a"
    ]


def test_many_failures_of_a_model_are_one_event_now_and_then(failures):
    def failed(count):
        return msgspec.structs.replace(
            WEIGHT, model_failures=count, last_model_failure=f"request r{count}: NaN"
        )

    failures.look([WEIGHT], NOW_S)
    told = [failures.look([failed(1 + second)], NOW_S + second) for second in range(61)]
    messages = [happening.message for happenings in told for happening in happenings]
    assert len(messages) == 1 + int(60 // MODEL_EVERY_S)
    assert messages[0] == "1 request ended because the output of m was invalid; the last, request r1: NaN"
    assert messages[1].startswith("30 requests ended")
