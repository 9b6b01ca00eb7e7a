"""A lane that was lost frees its buffers at once: 35 MiB are too much to wait for a garbage collector."""

from __future__ import annotations

import gc
import weakref

import pytest
from flume_common.lanes import LaneDown
from flume_common.layout import KvLayout
from flume_weight.errors import PeerLost
from flume_weight.fleet import Fleet
from flume_weight.placement import Balance

LAYOUT = KvLayout(num_layers=2, num_query_heads=4, num_kv_heads=2, head_dim=16, dtype="float32")


class Buffers:
    pass


class LostPeer:
    """Its lane turns out to be down while a frame of it is at hand."""

    def __init__(self) -> None:
        self.buffers = Buffers()

    def hear(self) -> bool:
        frame = self.buffers
        try:
            self._poll(frame)
        except LaneDown as error:
            raise PeerLost("attention-1", str(error)) from error
        return False

    def _poll(self, frame: Buffers) -> None:
        raise LaneDown("attention-1", "its process ended")


@pytest.fixture
def without_collector():
    gc.disable()
    yield
    gc.enable()


def test_nothing_holds_the_buffers_of_a_lane_once_its_loss_was_dealt_with(without_collector):
    fleet = Fleet(LAYOUT, Balance(), "weight-1")
    fleet.peers["attention-1"] = LostPeer()
    buffers = weakref.ref(fleet.peers["attention-1"].buffers)

    def turn() -> None:
        _, lost = fleet.hear()
        for error in lost:
            assert "its process ended" in error.reason
            fleet.drop(error.node, [])

    turn()
    assert not fleet.peers
    assert buffers() is None
