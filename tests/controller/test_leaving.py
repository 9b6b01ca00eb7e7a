from dataclasses import replace

import pytest
from flume_controller.leaving import with_deadline
from flume_controller.plan import NodeView, Phase
from flume_controller.spec import AttentionSpec, Deadline

PLAIN = AttentionSpec(desired=1)
SCALED = AttentionSpec(desired=1, scale_deadline=Deadline(within_s=30, by_s=1030))
DRAINED = AttentionSpec(
    desired=1, drained=("a", "b"), drain_deadlines={"a": Deadline(within_s=30, by_s=1030)}
)
READY = NodeView("a", Phase.READY)
DRAINING = replace(READY, phase=Phase.DRAINING)


@pytest.mark.parametrize(
    "view, spec, told_s, now_s, by_s, told, overdue",
    [
        pytest.param(READY, PLAIN, 0, 1000, 0, True, False, id="no deadline"),
        pytest.param(READY, SCALED, 0, 1010, 1030, False, False, id="what remains of the scale's"),
        pytest.param(READY, SCALED, 0, 5000, 5030, False, False, id="all of it for who leaves later"),
        pytest.param(DRAINING, SCALED, 1030.4, 1010, 1030, True, False, id="told"),
        pytest.param(DRAINING, SCALED, 0, 1010, 1030, False, False, id="draining since before the scale"),
        pytest.param(DRAINING, SCALED, 1200, 1010, 1030, False, False, id="a shorter one is news"),
        pytest.param(DRAINING, SCALED, 1030.4, 1029, 1030, True, False, id="not yet over"),
        pytest.param(DRAINING, SCALED, 1030.4, 1031, 1030.4, True, True, id="over, by the node's own record"),
        pytest.param(DRAINING, SCALED, 5030, 5010, 5030, True, False, id="who left later has its own"),
        pytest.param(DRAINING, PLAIN, 1030, 1010, 1030, True, False, id="a later scale takes none back"),
        pytest.param(DRAINING, PLAIN, 1030, 1030, 1030, True, True, id="nor does it then"),
        pytest.param(READY, PLAIN, 900, 1000, 900, True, False, id="only who drains can be late"),
        pytest.param(READY, DRAINED, 0, 1010, 1030, False, False, id="a drain's deadline is its own"),
        pytest.param(DRAINING, DRAINED, 0, 2000, 2030, False, False, id="nobody looked: all of it again"),
        pytest.param(DRAINING, DRAINED, 1030, 1031, 1030, True, True, id="a drain that is late"),
        pytest.param(replace(DRAINING, id="b"), DRAINED, 1030, 1031, 0, False, False, id="taken back"),
    ],
)
def test_what_a_node_is_to_leave_by(view, spec, told_s, now_s, by_s, told, overdue):
    found = with_deadline(view, spec, told_s, now_s)
    assert (found.leave_by_s, found.told, found.overdue) == (by_s, told, overdue)
    assert found.drained == (spec is DRAINED)
