"""An attention node with a GPU that is asked in a region: no message comes back, and every partial is checked
against the definition over exactly the tokens the node should hold."""

import time
from random import Random

import pytest
import torch
from direct_weight_node import DirectWeightNode
from flume_attention.cuda import session
from flume_attention.cuda.direct_steps import MOST_PARTS, Size
from flume_common.lanes import Port
from flume_common.wire import LaneShape
from gpu_node import LAYOUT, GpuNode

WHOLE = Size(1, 1)
BLOCK = LAYOUT.block_tokens


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def weight_node():
    with Port(spin_s=0) as port:
        node = DirectWeightNode(port, LaneShape(LAYOUT, 64, 8, 64 * LAYOUT.layer_token_bytes))
        node.want = 40
        yield node


def attach(node, weight_node):
    node.attach(weight_node)
    weight_node.memory = node.memory
    return weight_node


def part_filled(w, slot, ranges):
    """So many ranges in a slot, none of which fills its last block, and the last of which is open."""
    w.step((slot, 0, 2), ops=[w.open(slot)])
    for _ in range(ranges - 1):
        w.step((slot, 0, 3), ops=[w.close(slot), w.open(slot)])


def test_a_sequence_is_decoded_token_by_token_by_one_captured_step(weight_node):
    with GpuNode(direct=True) as node:
        w = attach(node, weight_node)
        w.step((0, 0, 10), ops=[w.open(0)])
        for _ in range(6):
            w.step((0, 1, 1), kv_layers=3)
        assert (node.direct_steps.captures, node.direct_steps.of(WHOLE).replays) == (1, 6)
        assert node.steps.captures == 0


def test_batches_of_other_rows_lengths_and_routes_are_answered_without_another_capture(weight_node):
    with GpuNode(direct=True) as node:
        w = attach(node, weight_node)
        w.step(*[(slot, 0, 2 + 3 * slot) for slot in range(5)], ops=[w.open(slot) for slot in range(5)])
        w.step(*[(slot, 1, 1) for slot in range(5)])
        w.step((3, 1, 1), (0, 1, 0), (4, 1, 0), (1, 1, 1), (2, 1, 0))
        moved = [w.close(1), w.release(0), w.open(0)]
        w.step((1, 1, 0), (2, 1, 1), (0, 1, 1), (4, 1, 1), (3, 1, 1), ops=moved)
        w.step((4, 1, 1), (3, 1, 0), (2, 1, 1), (0, 1, 2), (1, 1, 0), (5, 0, 3), ops=[w.open(5)])
        assert (node.direct_steps.captures, node.direct_steps.of(Size(8, 1)).replays) == (1, 4)


def test_what_was_foreseen_is_captured_beforehand_whatever_ranges_look_like(weight_node):
    with GpuNode(direct=True) as node:
        w = attach(node, weight_node)
        with torch.inference_mode():
            node.direct_steps.prepare()
        captures = node.direct_steps.captures
        w.step((1, 0, 5), ops=[w.open(1), w.open(2)])
        part_filled(w, 0, 3)
        w.step((1, 1, 1), (0, 1, 1), (2, 1, 0))
        part_filled(w, 3, MOST_PARTS)
        w.step((3, 1, 1), (0, 1, 0), (1, 1, 1), (2, 1, 1))
        w.step((2, 1, 1), (3, 1, 1))
        assert node.direct_steps.captures == captures == 8


def test_a_row_of_more_ranges_than_foreseen_has_a_step_captured_when_it_comes(weight_node):
    with GpuNode(direct=True) as node:
        w = attach(node, weight_node)
        part_filled(w, 0, MOST_PARTS + 2)
        w.step((0, 1, 1))
        w.step((0, 1, 1))
        assert (node.direct_steps.captures, node.direct_steps.of(Size(8, 8)).replays) == (1, 2)


def test_more_ranges_than_tables_were_foreseen_for_are_answered_too(weight_node):
    with GpuNode(direct=True, max_rows=2) as node:
        weight_node.rows = 2
        w = attach(node, weight_node)
        for slot in range(2):
            part_filled(w, slot, MOST_PARTS)
        w.step((0, 1, 1), (1, 1, 1))
        assert node.direct_steps.of(Size(8, MOST_PARTS)).replays == 1


def test_rows_longer_than_a_table_are_spread(weight_node):
    with GpuNode(direct=True, max_length=2 * BLOCK) as node:
        w = attach(node, weight_node)
        w.step((0, 0, 2 * BLOCK), ops=[w.open(0)])
        w.step((0, 1, 1))
        assert node.direct_steps.of(WHOLE).replays == 1
        w.step((0, 1, 3 * BLOCK))
        w.step((0, 1, 1))
        assert node.direct_steps.of(Size(4, MOST_PARTS)).replays == 1


def test_chunks_come_by_messages_in_between(weight_node):
    with GpuNode(direct=True) as node:
        w = attach(node, weight_node)
        w.step((0, 0, 6), ops=[w.open(0)])
        w.step((0, 1, 1))
        w.step((0, 7, 7))
        w.step((0, 1, 1))
        assert node.direct_steps.of(WHOLE).replays == 2


def test_the_autoscaler_learns_what_direct_steps_read_and_how_long_that_took(weight_node):
    with GpuNode(direct=True) as node:
        w = attach(node, weight_node)
        w.step((0, 0, 10), ops=[w.open(0)])
        began = time.perf_counter()
        for _ in range(5):
            w.step((0, 1, 1))
        elapsed_s = time.perf_counter() - began
        w.step((0, 0, 1))  # the node has seen the end of the step before
        reads = node.node.reads
        assert (reads.steps, reads.bytes) == (5, sum(range(10, 15)) * LAYOUT.token_bytes)
        assert 0 < reads.seconds < elapsed_s * LAYOUT.num_layers  # one is timed, and stands for all


def test_queries_on_a_slot_that_holds_nothing_get_zero_and_minus_infinity(weight_node):
    with GpuNode(direct=True) as node:
        w = attach(node, weight_node)
        running = w.begin((0, 1, 1), ops=[w.open(0)])
        for layer in range(LAYOUT.num_layers):
            running.ask(layer)
            o, lse = w.partial(running.number, layer, 1)
            assert not o.any() and bool((lse == -torch.inf).all())
        running.send_kv()


@pytest.mark.parametrize("answered", range(LAYOUT.num_layers + 1))
def test_a_step_abandoned_after_any_layer_leaves_the_device_ready_for_the_next(weight_node, answered):
    with GpuNode(direct=True) as node:
        w = attach(node, weight_node)
        w.step((0, 0, 9), ops=[w.open(0)])
        running = w.begin((0, 1, 1))
        for layer in range(answered):
            running.ask(layer)
            running.check(layer)
        w.step((0, 1, 1))
        w.step((0, 1, 1))
        assert node.direct_steps.captures == 1


def test_a_step_that_lasts_long_says_now_and_then_that_the_node_is_there(weight_node, monkeypatch):
    monkeypatch.setattr(session, "ALIVE_EVERY_S", 0.05)
    with GpuNode(direct=True) as node:
        w = attach(node, weight_node)
        w.step((0, 0, 9), ops=[w.open(0)])
        running = w.begin((0, 1, 1))
        running.ask(0)
        running.check(0)  # and then nothing, as if one of us had been stopped
        w.credits_waiting(0.2)
        assert w.credits_waiting(0.3) >= 3
        running.ask(1)
        running.check(1)


def test_an_abandoned_step_is_not_answered_any_more(weight_node):
    with GpuNode(direct=True) as node:
        w = attach(node, weight_node)
        w.step((0, 0, 9), ops=[w.open(0)])
        w.step((0, 1, 1))
        before = w.answered
        abandoned = w.begin((0, 1, 1))
        w.plan()
        w.credits_waiting(0.05)
        w.is_direct = True  # as that step was
        abandoned.ask(0)
        w.credits_waiting(0.05)
        assert w.answered == before
        w.step((0, 1, 1))


def test_a_step_that_does_not_end_for_too_long_is_released_and_the_next_is_answered(weight_node):
    with GpuNode(direct=True, query_timeout_s=0.1) as node:
        w = attach(node, weight_node)
        w.step((0, 0, 9), ops=[w.open(0)])
        late = w.begin((0, 1, 1))
        late.ask(0)
        late.check(0)
        time.sleep(0.3)
        late.ask(1)
        w.timeout_s = 0.3
        with pytest.raises(AssertionError, match="not answered"):
            late.check(1)
        w.timeout_s = 10.0
        w.step((0, 1, 1))
        w.step((0, 1, 1))
        assert node.direct_steps.captures == 1


def test_a_lane_that_ends_leaves_no_device_waiting(weight_node):
    with GpuNode(direct=True) as node:
        w = attach(node, weight_node)
        w.step((0, 0, 9), ops=[w.open(0)])
        w.begin((0, 1, 1)).ask(0)
        w.credits_waiting(0.1)
        started_s = time.monotonic()
    assert not node._thread.is_alive() and time.monotonic() - started_s < 2.0
    assert node.direct_steps.of(WHOLE).graph.done()


def test_random_routes_stalls_and_abandoned_steps_get_no_wrong_partial_and_no_capture(weight_node):
    random = Random(3)
    with GpuNode(direct=True) as node:
        w = attach(node, weight_node)
        with torch.inference_mode():
            node.direct_steps.prepare()
        captures, ranges = node.direct_steps.captures, [1] * 4
        w.step(*[(slot, 0, 1 + slot) for slot in range(4)], ops=[w.open(slot) for slot in range(4)])
        for _ in range(60):
            slot, ops = random.randrange(4), []
            if ranges[slot] == MOST_PARTS or w.slots[slot].held > 12:
                ops, ranges[slot] = [w.release(slot), w.open(slot)], 1
            elif random.random() < 0.3:
                ops, ranges[slot] = [w.close(slot), w.open(slot)], ranges[slot] + 1
            slots = random.sample(range(4), random.randint(1, 4))
            running = w.begin(*[(slot, 1, random.randint(0, 1)) for slot in slots], ops=ops)
            asked = random.choice([0, 1, 2] + [LAYOUT.num_layers] * 6)
            for layer in range(asked):
                running.ask(layer)
                running.check(layer)
                time.sleep(0.005 * (random.random() < 0.05))
            if asked == LAYOUT.num_layers:
                running.send_kv()
        assert node.direct_steps.captures == captures
