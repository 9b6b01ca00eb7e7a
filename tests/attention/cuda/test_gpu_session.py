"""An attention node with a GPU against a fake weight node over real lanes: every partial is checked against
the definition over exactly the tokens the node should hold."""

import time

import pytest
import torch
from fake_weight_node import FakeWeightNode
from flume_common.lanes import Port
from flume_common.wire import LaneShape
from gpu_node import LAYOUT, GpuNode


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def weight_node():
    with Port(spin_s=0) as port:
        node = FakeWeightNode(port, LaneShape(LAYOUT, 64, 8, 64 * LAYOUT.layer_token_bytes))
        node.want = 40
        yield node


def test_a_sequence_is_decoded_token_by_token_by_one_captured_step(weight_node):
    with GpuNode() as node:
        w = node.attach(weight_node)
        w.step((0, 0, 10), ops=[w.open(0)])
        for _ in range(6):
            w.step((0, 1, 1), kv_layers=3)
        assert (node.steps.captures, node.steps.of(1).replays) == (1, 6)


def test_batches_of_other_rows_lengths_and_routes_are_answered_without_another_capture(weight_node):
    with GpuNode() as node:
        w = node.attach(weight_node)
        w.step(*[(slot, 0, 2 + 3 * slot) for slot in range(5)], ops=[w.open(slot) for slot in range(5)])
        w.step(*[(slot, 1, 1) for slot in range(5)])
        w.step((3, 1, 1), (0, 1, 0), (4, 1, 0), (1, 1, 1), (2, 1, 0))
        moved = [w.close(1), w.release(0), w.open(0)]
        w.step((1, 1, 0), (2, 1, 1), (0, 1, 1), (4, 1, 1), (3, 1, 1), ops=moved)
        w.step((4, 1, 1), (3, 1, 0), (2, 1, 1), (0, 1, 2), (1, 1, 0))
        assert (node.steps.captures, node.steps.of(5).replays) == (1, 4)
        w.step((2, 1, 1))
        assert node.steps.captures == 2, "a smaller bucket is its own"


def test_chunks_and_ranges_that_do_not_join_are_answered_outside_of_graphs(weight_node):
    with GpuNode() as node:
        w = node.attach(weight_node)
        w.step((0, 0, 6), ops=[w.open(0)])
        w.step((0, 7, 7))
        w.step((0, 1, 0), ops=[w.close(0)])
        captures = node.steps.captures
        w.step((0, 1, 3), ops=[w.open(0)])
        w.step((0, 1, 1))
        w.step((0, 4, 4), (1, 0, 2), ops=[w.open(1)])
        w.step((0, 2, 2), (1, 1, 1))
        assert node.steps.captures == captures == 1


def test_queries_on_a_slot_that_holds_nothing_get_zero_and_minus_infinity(weight_node):
    with GpuNode() as node:
        w = node.attach(weight_node)
        running = w.begin((0, 1, 1), ops=[w.open(0)])
        for layer in range(LAYOUT.num_layers):
            running.ask(layer)
            o, lse = w.partial(running.number, layer, 1)
            assert not o.any() and bool((lse == -torch.inf).all())
        running.send_kv()


@pytest.mark.parametrize("answered", range(LAYOUT.num_layers + 1))
def test_a_step_abandoned_after_any_layer_leaves_the_device_ready_for_the_next(weight_node, answered):
    with GpuNode() as node:
        w = node.attach(weight_node)
        w.step((0, 0, 9), ops=[w.open(0)])
        running = w.begin((0, 1, 1))
        for layer in range(answered):
            running.ask(layer)
            running.check(layer)
        w.step((0, 1, 1))
        w.step((0, 1, 1))
        assert node.steps.captures == 1


def test_a_step_abandoned_with_its_query_on_the_way_is_not_answered_later(weight_node):
    with GpuNode() as node:
        w = node.attach(weight_node)
        w.step((0, 0, 9), ops=[w.open(0)])
        w.begin((0, 1, 1)).ask(0)
        w.step((0, 1, 1))
        w.step((0, 1, 1))


def test_a_step_nobody_asks_about_for_too_long_is_released_and_the_next_is_answered(weight_node):
    with GpuNode(query_timeout_s=0.1) as node:
        w = node.attach(weight_node)
        w.step((0, 0, 9), ops=[w.open(0)])
        late = w.begin((0, 1, 1))
        late.ask(0)
        late.check(0)
        time.sleep(0.3)
        late.ask(1)
        w.timeout_s = 0.3
        with pytest.raises(AssertionError, match="no PARTIAL"):
            late.check(1)
        w.timeout_s = 10.0
        w.step((0, 1, 1))
        w.step((0, 1, 1))
        assert node.steps.captures == 1


def test_rows_longer_than_a_graph_was_captured_for_are_answered_outside_of_it(weight_node):
    with GpuNode(max_length=2 * LAYOUT.block_tokens) as node:
        w = node.attach(weight_node)
        w.step((0, 0, 2 * LAYOUT.block_tokens), ops=[w.open(0)])
        w.step((0, 1, 1))
        assert node.steps.captures == 1
        w.step((0, 1, 1))
        assert node.steps.of(1).replays == 1


def test_two_microbatches_are_answered_by_one_captured_step_each_on_its_own(weight_node):
    with GpuNode() as node:
        w = node.attach(weight_node)
        w.step(*[(slot, 0, 2 + 3 * slot) for slot in range(5)], ops=[w.open(slot) for slot in range(5)])
        for _ in range(3):
            w.step(*[(slot, 1, 1) for slot in range(5)], second=2)
        w.step((4, 1, 1), (2, 1, 0), (0, 1, 1), second=1, kv_layers=3)
        assert (node.steps.captures, node.steps.of(3, 2).replays) == (2, 3)
        assert node.steps.of(2, 2).replays == 1


def test_a_microbatch_without_queries_here_has_no_messages_and_steps_of_one_and_two_alternate(weight_node):
    with GpuNode() as node:
        w = node.attach(weight_node)
        w.step(*[(slot, 0, 9) for slot in range(3)], ops=[w.open(slot) for slot in range(3)])
        for second in (1, 3, 0, 2, 0, 3, 1):
            w.step(*[(slot, 1, 1) for slot in range(3)], second=second)
        w.step((0, 0, 1), (1, 1, 1), second=1)
        assert node.steps.captures == 3, "all of three rows, two parts of two, one row"


def test_two_microbatches_of_chunks_are_answered_outside_of_graphs(weight_node):
    with GpuNode() as node:
        w = node.attach(weight_node)
        w.step((0, 0, 6), (1, 0, 3), ops=[w.open(0), w.open(1)])
        w.step((0, 3, 3), (1, 1, 1), second=1)
        w.step((0, 1, 1), (1, 2, 2), second=1)
        assert node.steps.captures == 0


@pytest.mark.parametrize("answered", range(2 * LAYOUT.num_layers + 1))
def test_a_step_abandoned_after_any_answer_of_two_microbatches_leaves_the_device_ready(weight_node, answered):
    with GpuNode() as node:
        w = node.attach(weight_node)
        w.step((0, 0, 9), (1, 0, 3), ops=[w.open(0), w.open(1)])
        running = w.begin((0, 1, 1), (1, 1, 1), second=1)
        running.ask(0)
        turns = [(layer, part) for layer in range(LAYOUT.num_layers) for part in running.parts]
        for layer, part in turns[:answered]:
            running.check(layer, part)
            if layer + 1 < LAYOUT.num_layers:
                running.ask(layer + 1, part)
        w.step((0, 1, 1), (1, 1, 1))
        w.step((0, 1, 1), (1, 1, 1), second=1)
        assert node.steps.captures == 2
