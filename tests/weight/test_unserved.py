"""How long waiting sequences wait for a lane."""

import math
from types import SimpleNamespace

from flume_weight.serving_state import DRAINING_GRACE_S
from flume_weight.unserved import Unserved


def waiting(*arrived_s):
    return [SimpleNamespace(arrived_s=at_s) for at_s in arrived_s]


def noted(*looks, wait_s=5.0):
    """After looks (time, lanes, lanes to nodes that take tails)."""
    made = Unserved(wait_s)
    for at_s, lanes, open_lanes in looks:
        made.note(at_s, lanes=lanes, open_lanes=open_lanes)
    return made


def test_with_a_lane_a_sequence_waits_for_memory_without_end():
    made = noted((0, 2, 1))
    assert made.overdue(waiting(0), 1000) == [] and made.next_look_s(waiting(0), 1000) == math.inf


def test_without_a_lane_it_waits_so_long_and_no_longer():
    made = noted((0, 1, 1), (10, 0, 0))
    old, new = waiting(3, 12)
    assert made.overdue([old, new], 14.9) == []
    assert made.next_look_s([old, new], 14) == 1
    assert made.overdue([old, new], 15) == [old]
    assert made.overdue([new], 17) == [new]


def test_a_lane_that_came_back_ends_the_wait():
    made = noted((0, 0, 0), (4, 1, 1), (6, 0, 0))
    assert made.overdue(waiting(0), 10) == []
    assert made.overdue(waiting(0), 11) != []


def test_nodes_that_all_drain_are_waited_for_longer():
    made = noted((0, 1, 0), (1, 1, 0))
    assert made.overdue(waiting(0), DRAINING_GRACE_S + 4) == []
    assert made.overdue(waiting(0), DRAINING_GRACE_S + 5) != []
    gone = noted((0, 1, 0), (1, 0, 0))
    assert gone.overdue(waiting(0), 6) != [], "they are gone"
