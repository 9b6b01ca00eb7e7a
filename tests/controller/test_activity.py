"""What flumectl says of weight nodes that work, wait, load and hang."""
# ruff: noqa: F811 # fixtures are imported, and named again by whoever takes them

import sys
from pathlib import Path

import pytest
from flume_controller.flumectl.activity import activity_line, activity_row
from flume_protos.v1 import common_pb2
from flume_protos.v1 import weight_pb2 as pb

sys.path.insert(0, str(Path(__file__).parent))
import fake_admin
from flumectl_fixtures import fake, flumectl, process, server  # noqa: F401 # fixtures


def status(activity=None, *, done=0, total=0, for_s=23.4, quiet_s=0.3, awaits=False, **counts):
    engine = None
    if activity:
        engine = common_pb2.EngineActivity(
            activity=activity, activity_s=for_s, quiet_s=quiet_s, done=done, total=total, step=41,
            prefill_tokens=512, awaits_node=awaits,
        )  # fmt: skip
    return pb.WeightStatusReply(node="weight-1", working=bool(activity), engine=engine, **counts)


PREFILL = {"prefill_computed_tokens": 3200, "prefill_total_tokens": 5600}


@pytest.mark.parametrize(
    "said, line",
    [
        (
            status("STEPPING", done=11, total=30, prefilling=1, decoding=2, **PREFILL),
            "prefills 1, decodes 2; 3200 of 5600 prompt tokens; step 41 for 23s, layer 12 of 30",
        ),
        (
            status("STEPPING", done=30, total=30, prefilling=1, awaits=True, for_s=70),
            "prefills 1; step 41 for 1m10s, layer 30 of 30, waits for an attention node",
        ),
        (
            status("STEPPING", done=2, total=30, queued=1, quiet_s=12.0),
            "queued 1; step 41 for 23s, layer 3 of 30; no progress for 12s",
        ),
        (status("LOADING", done=450, total=1000), "loads its model, 45 % after 23s"),
        (status("LOADING"), "loads its model, after 23s"),
        (status("PREPARING"), "prepares steps, for 23s"),
        (status(), "starts its engine"),
        (status("IDLE", quiet_s=0.5), "idle"),
        (status("IDLE", quiet_s=0.5, queued=2), "queued 2"),
    ],
)
def test_a_line_for_people(said, line):
    assert activity_line(activity_row(said)) == f"weight-1: {line}"


def test_status_shows_it_and_who_did_not_answer(flumectl, fake):
    fake.statuses = [fake_admin.status()]
    fake.statuses[0].activity.append(status("STEPPING", done=11, total=30, prefilling=1, **PREFILL))
    fake.statuses[0].unanswered.append("weight-2")
    lines = flumectl("status").stdout.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("Weight nodes:"))
    assert (
        lines[at + 1] == "  weight-1: prefills 1; 3200 of 5600 prompt tokens; step 41 for 23s, layer 12 of 30"
    )
    assert lines[at + 2] == "  weight-2: did not answer in time"
    assert '"step": 41' in flumectl("status", "-o", "json").stdout
