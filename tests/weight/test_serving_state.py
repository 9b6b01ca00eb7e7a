"""When a weight node says that it can serve."""

from flume_common.membership import State
from flume_common.reasons import Reason, sentence
from flume_weight.serving_state import DRAINING_GRACE_S, NO_LANE_GRACE_S, Serving, ServingState

READY = Serving(State.READY)


def look(state, now_s, lanes="", draining="", capacity_tokens=None, engine_ready=True):
    """Nodes are letters."""
    capacity = 100 * len(lanes) if capacity_tokens is None else capacity_tokens
    return state.look(
        now_s, engine_ready=engine_ready, lanes=lanes, draining=draining, capacity_tokens=capacity
    )


def test_a_node_that_loads_its_model_says_so():
    assert look(ServingState(), 0, engine_ready=False) == (State.PREPARING, Reason.LOADING)


def test_without_a_lane_a_node_is_never_ready():
    state = ServingState()
    assert [look(state, at) for at in (0, 0.5, 100)] == [(State.PREPARING, Reason.NO_LANE)] * 3


def test_a_lane_to_a_node_without_memory_is_none():
    assert look(ServingState(), 0, "a", capacity_tokens=0) == (State.PREPARING, Reason.NO_LANE)


def test_a_lane_that_comes_back_at_once_is_not_missed_and_one_that_does_not_is():
    state = ServingState()
    assert look(state, 0, "a") == READY
    assert look(state, NO_LANE_GRACE_S / 2) == READY
    assert look(state, NO_LANE_GRACE_S) == (State.PREPARING, Reason.NO_LANE)
    assert look(state, NO_LANE_GRACE_S + 1, "a") == READY


def test_nodes_that_all_drain_are_waited_for_longer():
    state = ServingState()
    assert look(state, 0, "ab", "a") == READY
    assert look(state, DRAINING_GRACE_S - 1, "ab", "ab") == READY
    assert look(state, DRAINING_GRACE_S, "ab", "ab") == (State.PREPARING, Reason.ONLY_DRAINING)
    assert look(ServingState(), 0, "a", "a") == (State.PREPARING, Reason.ONLY_DRAINING)


def test_a_new_engine_has_never_served():
    state = ServingState()
    look(state, 0, "a")
    look(state, 0.1, engine_ready=False)
    assert look(state, 0.2) == (State.PREPARING, Reason.NO_LANE)


def test_people_are_told_in_a_sentence():
    assert sentence("weight-1", Reason.NO_LANE) == "weight-1 has no lane to an attention node"
    assert sentence("weight-1", "Tired") == "weight-1 is not ready (Tired)"
    assert sentence("weight-1", "") == "weight-1 is not ready"
