import itertools

import pytest
from flume_common.reasons import Reason
from flume_controller import happenings
from flume_controller.plan import NodeView, Phase
from flume_controller.progress import Progress
from flume_controller.spec import AttentionSpec, ConditionStatus, GaveUp, Unready
from flume_controller.status import Crash, Service, WeightView, report

SPEC = AttentionSpec(desired=2, generation=7)


def nodes(*phases):
    return [NodeView(f"attention-{number}", phase) for number, phase in enumerate(phases, 1)]


def conditions(status):
    return {item.type: (str(item.status), item.reason) for item in status.conditions}


FINE = Progress(last_good=2, at_s=0.5, gave_up=None)


def make(*phases, spec=SPEC, crashes=(), failures=(), state=FINE, previous=None, now_s=1.0, **more):
    return report(spec, nodes(*phases), crashes, failures, state, previous, now_s, **more)


def available(*phases, weights=(), canaries=None, spec=SPEC):
    """Reason and message of Available, with these weight nodes."""
    status = make(*phases, spec=spec, service=Service(weights, canaries or {}))
    (found,) = (item for item in status.conditions if item.type == "Available")
    assert (found.status == "True") == (found.reason == "EnoughNodes")
    return found.reason, found.message


SERVES = WeightView("weight-1", True)
CUT_OFF = WeightView("weight-1", False, Reason.NO_LANE)
LOADS = WeightView("weight-2", False, Reason.LOADING)


@pytest.mark.parametrize(
    "phases, weights, reason, says",
    [
        ((Phase.READY,), [SERVES], "EnoughNodes", "1 ready"),
        ((Phase.READY,), [SERVES, LOADS], "EnoughNodes", "1 ready"),
        ((Phase.READY,), [], "NoWeightNode", "no weight node is registered"),
        ((Phase.READY,), [LOADS], "NoWeightNode", "weight-2 is loading its model"),
        ((Phase.READY,), [CUT_OFF], "NoLane", "weight-1 has no lane to an attention node"),
        ((Phase.READY,), [CUT_OFF, LOADS], "NoWeightNode", "weight-1 has no lane"),
        ((Phase.UNREACHABLE,), [SERVES], "NoLane", "no lane leads to attention-1"),
        ((Phase.UNREACHABLE,), [CUT_OFF], "NoLane", "weight-1 has no lane to an attention node"),
        ((Phase.STARTING,), [CUT_OFF], "TooFewNodes", "0 ready"),
        ((), [SERVES], "TooFewNodes", "0 ready"),
    ],
)
def test_requests_can_be_served_only_by_a_weight_node_that_has_a_lane(phases, weights, reason, says):
    found, message = available(*phases, weights=weights)
    assert found == reason and says in message


def test_a_path_that_no_canary_comes_through_is_not_available():
    canaries = {"router-1": "weight-1: no token within 10 s"}
    reason, message = available(Phase.READY, weights=[SERVES], canaries=canaries)
    assert reason == "CanaryFailed" and "router-1: weight-1: no token" in message


def test_none_wanted_is_the_first_reason():
    assert available(spec=AttentionSpec(desired=0))[0] == "ScaledToZero"


def test_a_node_that_no_weight_node_reaches_is_named_and_does_not_count():
    status = make(Phase.READY, Phase.UNREACHABLE)
    assert status.ready == 1
    (degraded,) = (item for item in status.conditions if item.type == "Degraded")
    assert degraded.reason == "NodeUnreachable"
    assert degraded.message == "registered, but no weight node has a lane there: attention-2"


def test_nodes_whose_ready_is_only_a_claim_are_listed():
    views = [
        NodeView("attention-1", Phase.READY),
        NodeView("attention-2", Phase.UNREACHABLE, reached=False),
        NodeView("attention-3", Phase.PREPARING, reached=False),
        NodeView("attention-4", Phase.PREPARING),
    ]
    status = report(SPEC, views, (), (), FINE, None, 1.0)
    assert status.unready == {
        "attention-2": Unready("UNREACHABLE", "NoLane"),
        "attention-3": Unready("PREPARING", "NoLane"),
    }


def test_a_spec_that_cannot_be_read_is_said_before_all_else():
    status = make(Phase.READY, Phase.LOST, invalid="spec/attention is not valid", failures=["x"])
    assert conditions(status)["Degraded"] == ("True", "InvalidSpec")


def test_a_disk_that_is_full_is_said_and_when_it_has_room_again():
    before = make(Phase.READY, Phase.READY)
    full = make(Phase.READY, Phase.READY, disk_full="the disk of /data is full", previous=before)
    after = make(Phase.READY, Phase.READY, previous=full)
    assert conditions(full)["Degraded"] == ("True", "DiskFull")
    assert conditions(full)["Available"] == ("True", "EnoughNodes"), "it stops nothing that works"
    news = [
        happenings.of_conditions(one.conditions, two.conditions)
        for one, two in itertools.pairwise((before, full, after, after))
    ]
    assert [[found.reason for found in items] for items in news] == [["DiskFull"], ["DiskHasRoom"], []]


def test_no_progress_within_the_deadline_is_said():
    status = make(Phase.READY, Phase.STARTING, state=Progress(1, 0.5, None, overdue=True))
    assert conditions(status)["Progressing"] == ("False", "ProgressDeadlineExceeded")
    assert (status.last_good, status.progressed_at_s) == (1, 0.5)


def test_a_scale_that_was_given_up_stays_visible_though_the_fleet_is_as_it_was():
    gave_up = GaveUp(generation=6, wanted=5, returned_to=2, at_s=9.0)
    status = make(Phase.READY, Phase.READY, state=Progress(2, 0.5, gave_up))
    assert conditions(status)["Progressing"] == ("False", "ProgressDeadlineExceeded")
    assert "5 were wanted" in status.conditions[1].message and status.gave_up == gave_up


def test_conditions_name_the_generation_they_are_about():
    assert {item.observed_generation for item in make(Phase.READY).conditions} == {7}


def test_the_generation_acted_on_and_the_counts_are_reported():
    status = make(Phase.READY, Phase.STARTING, Phase.PREPARING, Phase.DRAINING, Phase.STOPPING, Phase.DEAD)
    assert (status.observed_generation, status.desired) == (7, 2)
    assert (status.ready, status.preparing, status.draining) == (1, 2, 2)


@pytest.mark.parametrize(
    "phases, expected",
    [
        ((Phase.READY, Phase.READY), {"Available": "True", "Progressing": "False", "Degraded": "False"}),
        ((Phase.READY, Phase.STARTING), {"Available": "True", "Progressing": "True", "Degraded": "False"}),
        ((Phase.STARTING,), {"Available": "False", "Progressing": "True", "Degraded": "False"}),
        (
            (Phase.READY, Phase.READY, Phase.DRAINING),
            {"Available": "True", "Progressing": "True", "Degraded": "False"},
        ),
        ((Phase.READY, Phase.LOST), {"Available": "True", "Progressing": "True", "Degraded": "True"}),
    ],
    ids=["as desired", "scaling", "nothing ready", "draining", "one unreachable"],
)
def test_conditions_follow_from_the_phases(phases, expected):
    found = {kind: status for kind, (status, _) in conditions(make(*phases)).items()}
    assert found == expected


def test_fewer_than_the_minimum_is_not_available():
    status = make(Phase.READY, spec=AttentionSpec(desired=2, min=2))
    assert conditions(status)["Available"] == ("False", "TooFewNodes")


def test_wanting_none_is_not_available_but_as_desired():
    found = conditions(make(spec=AttentionSpec(desired=0)))
    assert found["Available"] == ("False", "ScaledToZero")
    assert found["Progressing"] == ("False", "AsDesired")


def test_a_crash_is_named_with_its_exit_code_and_log():
    status = make(Phase.READY, crashes=[Crash("attention-2", -9, "/logs/attention-2.log")])
    (degraded,) = (item for item in status.conditions if item.type == "Degraded")
    assert degraded.reason == "NodeCrashed"
    assert degraded.message == "attention-2 exited with -9 (log: /logs/attention-2.log)"


def test_an_action_that_failed_is_reported():
    assert conditions(make(failures=["Start(1): no such file"]))["Degraded"] == ("True", "ActionFailed")


def test_the_transition_time_changes_with_the_status_only():
    first = make(Phase.READY, Phase.STARTING, now_s=1.0)
    reworded = make(Phase.READY, Phase.READY, Phase.DRAINING, previous=first, now_s=2.0)
    turned = make(Phase.READY, Phase.READY, previous=reworded, now_s=3.0)
    times = [
        {item.type: item.last_transition_time_s for item in status.conditions}
        for status in (first, reworded, turned)
    ]
    assert first.conditions[1].message != reworded.conditions[1].message
    assert times == [
        {"Available": 1.0, "Progressing": 1.0, "Degraded": 1.0},
        {"Available": 1.0, "Progressing": 1.0, "Degraded": 1.0},
        {"Available": 1.0, "Progressing": 3.0, "Degraded": 1.0},
    ]


def test_all_conditions_are_set_at_the_first_visit():
    status = make()
    assert [item.type for item in status.conditions] == ["Available", "Progressing", "Degraded"]
    assert all(isinstance(item.status, ConditionStatus) for item in status.conditions)
