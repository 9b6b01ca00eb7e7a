"""One lane's slots, credit and step: what the protocol allows, and that nothing leaks."""

import numpy as np
import pytest
from flume_attention.blocks import BlockPool
from flume_attention.errors import StepRefused
from flume_attention.holdings import Holdings
from flume_common.layout import KvLayout
from flume_common.wire import LaneShape, Op, Refusal
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

LAYOUT = KvLayout(
    num_layers=2, num_query_heads=4, num_kv_heads=2, head_dim=8, dtype="float32", block_tokens=4
)
SHAPE = LaneShape(LAYOUT, max_step_tokens=32, max_step_sequences=4, kv_frame_bytes=1 << 14)


def rows(*items):
    """Rows (slot, queries, append, held[, position]); without a position the slot holds all before it."""
    whole = [item if len(item) == 5 else (*item, item[3]) for item in items]
    return np.array(whole, dtype=np.int64).reshape(-1, 5)


@pytest.fixture
def lane():
    holdings = Holdings(BlockPool(16), SHAPE)
    holdings.granted = 8
    return holdings


def run(lane, number, *items):
    lane.begin(number, rows(*items))
    lane.commit()


def refused(call, *args):
    with pytest.raises(StepRefused) as error:
        call(*args)
    return error.value.refusal


def test_a_sequence_is_opened_appended_to_asked_and_released(lane):
    lane.apply(Op.OPEN, 3, 0, 77)
    run(lane, 1, (3, 0, 6, 0))
    step = lane.begin(2, rows((3, 1, 1, 6)))
    assert [r.tokens for r in step.rows[0].past] == [6] and [r.tokens for r in step.rows[0].target] == [1]
    lane.commit()
    assert (lane.held_tokens, lane.held_blocks, lane.taken, lane.unused) == (7, 2, 2, 6)
    lane.apply(Op.RELEASE, 3, 0, 0)
    assert lane.blocks.held == 0 and lane.held_tokens == lane.held_blocks == 0
    assert lane.taken == 2, "blocks of a released slot go back to the node, not into the credit"


def test_a_row_asks_about_what_was_held_when_its_step_began(lane):
    lane.apply(Op.OPEN, 0, 0, 1)
    step = lane.begin(1, rows((0, 5, 5, 0)))
    lane.commit()
    assert step.rows[0].past == []


def test_a_closed_tail_can_come_back_to_the_same_slot(lane):
    lane.apply(Op.OPEN, 0, 0, 1)
    run(lane, 1, (0, 0, 5, 0))
    lane.apply(Op.CLOSE, 0, 0, 5)
    assert refused(lane.begin, 2, rows((0, 0, 1, 5))) is Refusal.NO_OPEN_RANGE
    lane.apply(Op.OPEN, 0, 9, 1)
    run(lane, 3, (0, 1, 2, 5, 9))
    assert lane.slots[0].held == 7 and lane.num_ranges == 2 and lane.held_blocks == 3


def test_closing_a_range_that_got_nothing_leaves_none(lane):
    lane.apply(Op.OPEN, 0, 0, 1)
    lane.apply(Op.CLOSE, 0, 0, 0)
    assert lane.num_ranges == 0


def test_a_lost_range_comes_back_in_its_place_while_its_successors_stay(lane):
    lane.granted = 16
    lane.apply(Op.OPEN, 0, 0, 1)
    run(lane, 1, (0, 0, 5, 0))
    lane.apply(Op.CLOSE, 0, 0, 5)
    lane.apply(Op.OPEN, 0, 20, 1)  # the tail; [5, 20) was another node's
    run(lane, 2, (0, 5, 6, 5, 20))
    lane.apply(Op.OPEN, 0, 5, 1)
    first = lane.begin(3, rows((0, 9, 9, 11, 5))).rows[0]
    lane.commit()
    second = lane.begin(4, rows((0, 6, 6, 20, 14))).rows[0]
    lane.commit()
    assert [sum(run.tokens for run in row.past) for row in (first, second)] == [5, 14]
    lane.apply(Op.CLOSE, 0, 5, 15)
    tail = lane.begin(5, rows((0, 1, 1, 26, 26))).rows[0]
    lane.commit()
    assert sum(run.tokens for run in tail.past) == 26
    assert [(item.start, item.length) for item in lane.slots[0].ranges] == [(0, 5), (5, 15), (20, 7)]


def test_refusals_name_what_is_wrong_and_change_nothing(lane):
    lane.apply(Op.OPEN, 0, 0, 1)
    run(lane, 1, (0, 0, 3, 0))
    before = lane.blocks.held, lane.unused
    assert refused(lane.begin, 2, rows((9, 1, 0, 0))) is Refusal.UNKNOWN_SLOT
    assert refused(lane.begin, 2, rows((0, 1, 0, 2))) is Refusal.LENGTH_MISMATCH
    assert refused(lane.begin, 2, rows((0, 0, 30, 3))) is Refusal.OVER_CREDIT
    assert refused(lane.begin, 2, rows((0, 33, 0, 3))) is Refusal.TOO_LARGE
    assert refused(lane.begin, 2, rows((0, 0, -1, 3))) is Refusal.TOO_LARGE
    assert refused(lane.begin, 2, rows((0, 1, 0, 3), (0, 0, 1, 3))) is Refusal.LENGTH_MISMATCH
    assert refused(lane.begin, 2, rows((0, 1, 0, 3, 2))) is Refusal.LENGTH_MISMATCH
    assert refused(lane.begin, 2, rows((0, 0, 1, 3, 4))) is Refusal.NO_OPEN_RANGE
    assert refused(lane.apply, Op.CLOSE, 0, 1, 3) is Refusal.NO_OPEN_RANGE
    assert refused(lane.apply, Op.CLOSE, 0, 0, 4) is Refusal.LENGTH_MISMATCH
    assert refused(lane.apply, Op.CLOSE, 5, 4, 1) is Refusal.UNKNOWN_SLOT
    assert refused(lane.apply, Op.OPEN, 0, 0, 1) is Refusal.LENGTH_MISMATCH
    assert refused(lane.apply, Op.OPEN, 0, 3, 1) is Refusal.LENGTH_MISMATCH
    assert refused(lane.apply, Op.OPEN, 0, 9, 2) is Refusal.LENGTH_MISMATCH
    assert refused(lane.apply, 9, 0, 3, 1) is Refusal.UNKNOWN_SLOT
    assert refused(lane.set_credit, 5, 8) is Refusal.OVER_CREDIT
    assert (lane.blocks.held, lane.unused) == before and lane.want == 0


def test_more_rows_than_attached_for_are_too_large(lane):
    for slot in range(5):
        lane.apply(Op.OPEN, slot, 0, slot)
    assert refused(lane.begin, 1, rows(*[(slot, 1, 0, 0) for slot in range(5)])) is Refusal.TOO_LARGE


def test_an_append_larger_than_a_kv_frame_is_too_large():
    shape = LaneShape(LAYOUT, 32, 4, kv_frame_bytes=8 * LAYOUT.layer_token_bytes)
    lane = Holdings(BlockPool(16), shape, granted=16)
    lane.apply(Op.OPEN, 0, 0, 1)
    assert refused(lane.begin, 1, rows((0, 0, 9, 0))) is Refusal.TOO_LARGE
    lane.begin(1, rows((0, 0, 8, 0)))


def test_an_abandoned_step_takes_no_credit_and_no_memory(lane):
    lane.apply(Op.OPEN, 0, 0, 1)
    run(lane, 1, (0, 0, 3, 0))
    lane.begin(2, rows((0, 1, 9, 3)))
    assert lane.blocks.held == 3 and lane.reserved_blocks == 2 and lane.unused == 7
    lane.abandon()
    assert (lane.blocks.held, lane.reserved_blocks, lane.unused, lane.slots[0].held) == (1, 0, 7, 3)


def test_credit_covers_all_rows_of_a_step_together(lane):
    lane.granted = 3
    for slot in range(2):
        lane.apply(Op.OPEN, slot, 0, slot)
    assert refused(lane.begin, 1, rows((0, 0, 8, 0), (1, 0, 5, 0))) is Refusal.OVER_CREDIT
    lane.begin(1, rows((0, 0, 8, 0), (1, 0, 4, 0)))


def test_returned_credit_is_no_longer_the_lanes(lane):
    lane.set_credit(want_blocks=2, returned_blocks=6)
    assert lane.unused == 2 and lane.demand.want_blocks == 2
    assert refused(lane.set_credit, 2, 5) is Refusal.OVER_CREDIT, "what is returned stays returned"
    lane.apply(Op.OPEN, 0, 0, 1)
    assert refused(lane.begin, 1, rows((0, 0, 12, 0))) is Refusal.OVER_CREDIT


def test_when_the_lane_goes_everything_is_free(lane):
    lane.apply(Op.OPEN, 0, 0, 1)
    run(lane, 1, (0, 0, 9, 0))
    lane.begin(2, rows((0, 1, 5, 9)))
    lane.release_all()
    assert lane.blocks.held == 0 and lane.unused == 0 and lane.held_tokens == 0


class TwoLanes(RuleBasedStateMachine):
    """Two weight nodes doing whatever they like with one node's blocks."""

    @initialize(capacity=st.integers(4, 24))
    def start(self, capacity):
        self.pool = BlockPool(capacity)
        self.lanes = [Holdings(self.pool, SHAPE) for _ in range(2)]
        self.number = 0

    def free(self):
        reserved = sum(lane.reserved_blocks for lane in self.lanes)
        return self.pool.free + reserved - sum(lane.unused for lane in self.lanes)

    def attempt(self, lane, call, *args):
        before = lane.unused, {n: slot.held for n, slot in lane.slots.items()}
        try:
            call(*args)
        except StepRefused:
            assert before == (lane.unused, {n: slot.held for n, slot in lane.slots.items()})

    @rule(which=st.integers(0, 1), blocks=st.integers(0, 6))
    def grant(self, which, blocks):
        self.lanes[which].granted += min(blocks, self.free())

    @rule(which=st.integers(0, 1), back=st.integers(0, 3))
    def give_back(self, which, back):
        lane = self.lanes[which]
        if lane.reserved_blocks == 0:
            self.attempt(lane, lane.set_credit, 5, lane.returned + back)

    @rule(
        which=st.integers(0, 1),
        op=st.sampled_from(Op),
        slot=st.integers(0, 2),
        off=st.sampled_from([0, 0, 0, 1]),
    )
    def op(self, which, op, slot, off):
        lane = self.lanes[which]
        if lane.step is None or lane.step.committed:
            held = lane.slots[slot].held if slot in lane.slots else 0
            argument, key = held + off, slot
            if op is Op.CLOSE and held and off == 0:
                last = lane.slots[slot].ranges[-1]
                argument, key = last.start, last.length
            self.attempt(lane, lane.apply, op, slot, argument, key)

    @rule(which=st.integers(0, 1), appends=st.lists(st.integers(0, 9), min_size=1, max_size=3))
    def begin(self, which, appends):
        lane = self.lanes[which]
        lane.abandon()
        self.number += 1
        rows_of = zip(lane.slots.items(), appends, strict=False)
        items = [(number, 1, append, slot.held) for (number, slot), append in rows_of]
        self.attempt(lane, lane.begin, self.number, rows(*items))

    @rule(which=st.integers(0, 1))
    def commit(self, which):
        step = self.lanes[which].step
        if step is not None and not step.committed:
            self.lanes[which].commit()

    @rule(which=st.integers(0, 1))
    def die(self, which):
        self.lanes[which].release_all()

    @invariant()
    def memory_is_never_promised_twice_and_never_lost(self):
        held = sum(lane.held_blocks + lane.reserved_blocks for lane in self.lanes)
        assert self.pool.held == held
        assert self.free() >= 0
        assert all(lane.unused >= lane.reserved_blocks for lane in self.lanes)
        for lane in self.lanes:
            slots = lane.slots.values()
            assert lane.held_tokens == sum(slot.held for slot in slots)
            assert lane.held_blocks == sum(slot.num_blocks for slot in slots)
            assert all(slot.held == sum(item.length for item in slot.ranges) for slot in slots)


TwoLanes.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
TestTwoLanes = TwoLanes.TestCase
