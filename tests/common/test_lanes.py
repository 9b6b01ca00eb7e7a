"""The parts of lanes that need no peer: tags, frames, the name of a process."""

import itertools
import os
import select
import subprocess
import sys
import uuid
from dataclasses import replace

import numpy as np
import pytest
from flume_common.lanes import Port, Side
from flume_common.lanes.frames import PAGE_BYTES, RING_FRAMES, allocate_pages, block_bytes, cut
from flume_common.lanes.processes import Process
from flume_common.lanes.tags import LANE_MASK, MAX_LANE, tag_of
from flume_common.layout import KvLayout
from flume_common.pull_wire import PullShape
from flume_common.wire import HEADER_BYTES, HEADER_WORDS, Kind, LaneShape

LAYOUT = KvLayout(num_layers=2, num_query_heads=3, num_kv_heads=1, head_dim=5, dtype="bfloat16")
SHAPE = LaneShape(LAYOUT, max_step_tokens=7, max_step_sequences=2, kv_frame_bytes=10_001)


def test_every_channel_of_every_lane_has_a_tag_of_its_own():
    lanes = (0, 1, 2, 255, 256, MAX_LANE - 1, MAX_LANE)
    tags = {tag_of(lane, kind) for lane, kind in itertools.product(lanes, Kind)}
    assert len(tags) == len(lanes) * len(Kind)
    assert max(tags) < 1 << 64


def test_the_lane_of_a_tag_is_what_the_mask_leaves():
    for lane, other in itertools.permutations((1, 2, MAX_LANE), 2):
        assert {tag_of(lane, kind) & LANE_MASK for kind in Kind} == {tag_of(lane, Kind.PLAN) & LANE_MASK}
        assert tag_of(lane, Kind.KV) & LANE_MASK != tag_of(other, Kind.KV) & LANE_MASK


@pytest.mark.parametrize("lane", [-1, MAX_LANE + 1])
def test_a_lane_number_that_does_not_fit_is_refused(lane):
    with pytest.raises(ValueError, match=str(lane)):
        tag_of(lane, Kind.PLAN)


def test_one_side_receives_what_the_other_sends():
    for one, other, shape in (
        (Side.WEIGHT, Side.ATTENTION, LaneShape),
        (Side.PULLER, Side.LENDER, PullShape),
    ):
        assert one.sends == other.receives and other.sends == one.receives
        assert sorted(one.sends + other.sends) == sorted(shape.kinds)
    assert set(LaneShape.kinds) | set(PullShape.kinds) == set(Kind)


def test_frames_hold_the_largest_body_and_share_no_byte():
    block = allocate_pages(block_bytes(SHAPE))
    frames = cut(block, SHAPE)
    assert frames.keys() == set(SHAPE.kinds) and RING_FRAMES.keys() == set(Kind)
    for mark, (kind, ring) in enumerate(frames.items(), 1):
        assert len(ring) == RING_FRAMES[kind]
        for index, frame in enumerate(ring):
            assert len(frame.header) == HEADER_WORDS
            assert SHAPE.body_bytes(kind) <= len(frame.body) < SHAPE.body_bytes(kind) + 8
            assert frame.words.nbytes == frame.body.nbytes
            assert frame.header.ctypes.data % PAGE_BYTES == 0
            assert frame.body.ctypes.data == frame.header.ctypes.data + HEADER_BYTES
            frame.header.fill(100 * mark + index)
            frame.words.fill(-(100 * mark + index))
    for mark, ring in enumerate(frames.values(), 1):
        for index, frame in enumerate(ring):
            assert (frame.header == 100 * mark + index).all()
            assert (frame.words == -(100 * mark + index)).all()


def test_one_end_may_have_rings_of_its_own_and_a_ring_has_a_frame():
    rings = {Kind.QUERY: 1, Kind.PARTIAL: 6}
    frames = cut(allocate_pages(block_bytes(SHAPE, rings)), SHAPE, rings)
    assert {kind: len(ring) for kind, ring in frames.items()} == {
        kind: RING_FRAMES[kind] for kind in SHAPE.kinds
    } | rings
    with pytest.raises(ValueError, match="a QUERY ring has at least 1 frame, not 0"):
        block_bytes(SHAPE, {Kind.QUERY: 0})


def test_only_the_bytes_of_the_message_are_sent_and_many_sizes_cost_no_memory():
    frame = cut(allocate_pages(block_bytes(SHAPE)), SHAPE)[Kind.KV][0]
    for size in range(1000):
        assert frame.array(size).nbytes == HEADER_BYTES + size
    assert frame.array(7) is frame.array(7)
    assert len(frame._arrays) <= 64


@pytest.mark.parametrize(
    "block",
    [
        allocate_pages(block_bytes(SHAPE) - 1),
        allocate_pages(block_bytes(SHAPE) + 1)[1:],
        allocate_pages(block_bytes(SHAPE)).view(np.int8),
        allocate_pages(2 * block_bytes(SHAPE)).reshape(2, -1),
        allocate_pages(2 * block_bytes(SHAPE))[::2],
    ],
    ids=["too small", "not on a page", "not uint8", "not flat", "with gaps"],
)
def test_a_block_that_will_not_do_is_refused(block):
    with pytest.raises(ValueError, match="block"):
        cut(block, SHAPE)


def test_a_lane_uses_the_memory_it_is_given():
    given = []

    def allocate(size_bytes):
        given.append(allocate_pages(size_bytes))
        return given[0]

    with Port() as here, Port() as there:
        lane = here.connect(
            "there", there.address, SHAPE, Side.WEIGHT, send_lane=1, receive_lane=2, allocate=allocate
        )
        assert np.shares_memory(given[0], lane.sender(Kind.PLAN).frame().body)
    assert len(given) == 1


def test_the_frames_of_a_channel_can_be_looked_at_until_the_lane_is_closed():
    rings = {Kind.QUERY: 1, Kind.PARTIAL: 2}
    with Port() as here, Port() as there:
        lane = here.connect(
            "there", there.address, SHAPE, Side.ATTENTION, send_lane=1, receive_lane=2, rings=rings
        )
        partials, queries = lane.sender(Kind.PARTIAL), lane.receiver(Kind.QUERY)
        assert [len(partials.frames), len(queries.frames)] == [2, 1]
        assert partials.frame() is partials.frames[0]
        lane.close()
        assert partials.frames == queries.frames == ()


@pytest.mark.parametrize("wrong", [{"send_lane": -1}, {"allocate": np.zeros}])
def test_a_lane_that_cannot_be_made_leaves_nothing_open(wrong):
    with Port() as here, Port() as there:
        here.connect("there", there.address, SHAPE, Side.WEIGHT, send_lane=1, receive_lane=2)
        before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
        with pytest.raises(ValueError, match="lane"):
            here.connect(
                "there", there.address, SHAPE, Side.WEIGHT, **{"send_lane": 3, "receive_lane": 4} | wrong
            )
        assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize("address", [b"", b"x" * 20, b"\xff" * 200, Process.this().encode()])
def test_an_address_that_is_none_is_refused(address):
    with Port() as port, pytest.raises(ValueError, match=r"process|address"):
        port.connect("x", address, SHAPE, Side.WEIGHT, send_lane=1, receive_lane=2)


def test_the_name_of_a_process_survives_the_way():
    this = Process.this()
    assert Process.decode(this.encode()) == this
    assert len(this.encode()) == Process.SIZE_BYTES
    assert this.pid == os.getpid()


def test_a_descriptor_becomes_readable_when_its_process_ends():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = replace(Process.this(), pid=child.pid, started=started(child.pid))
    fd = name.open()
    assert not select.select([fd], [], [], 0.05)[0]
    child.stdin.close()
    assert select.select([fd], [], [], 5.0)[0]
    os.close(fd)
    child.wait()
    with pytest.raises(ProcessLookupError, match="ended"):
        name.open()


def test_a_process_that_took_over_the_number_is_not_mistaken_for_the_one_before():
    before = replace(Process.this(), started=Process.this().started - 1)
    with pytest.raises(ProcessLookupError, match="ended"):
        before.open()


def test_a_process_elsewhere_cannot_be_watched():
    assert replace(Process.this(), boot=str(uuid.uuid4())).open() is None
    assert replace(Process.this(), namespace=1).open() is None


def started(pid):
    with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
        return int(stat.read().rpartition(")")[2].split()[19])
