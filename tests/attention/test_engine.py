"""The engine process over real UCX lanes, driven by fake weight nodes, against the reference."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from asyncio.subprocess import PIPE
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import psutil
import pytest
import pytest_asyncio
import torch
from fake_weight_node import LAYOUT, FakeSlot, FakeWeightNode, RunningStep
from flume_attention.engine import QUIET_CREDIT_S
from flume_attention.messages import (
    Adopt,
    Attach,
    Attached,
    Detach,
    Detached,
    Kept,
    LaneClosed,
    Refused,
    Report,
    SetDraining,
)
from flume_common.lanes import Port
from flume_common.layout import KvLayout
from flume_common.wire import LaneShape, Op, Refusal, sequence_key
from real_engine import CAPACITY, Node, engine_with

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("engine_zygote")]


# What is the same on every device, and takes long.
only_on_cpu = pytest.mark.parametrize("shared_engine", ["cpu"], indirect=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["cpu", "cuda"])
async def shared_engine(engine_zygote, request):
    async with engine_with(device=request.param) as running:
        yield running.engine


@pytest_asyncio.fixture(loop_scope="module")
async def node(shared_engine):
    """The engine of this module, with no lane."""
    running = Node(shared_engine)
    yield running
    for lane in (await running.report()).lanes:
        running.engine.send(Detach(request=1, weight_node=lane.weight_node, epoch=lane.epoch))
        await running.expect(Detached)
    assert (await running.report()).used_blocks == 0


@pytest.fixture(scope="module")
def port():
    """The fake weight nodes' port; each has a lane of its own."""
    with Port() as opened:
        yield opened


DYING = """
import sys, time
from fake_weight_node import FakeWeightNode
from flume_attention.messages import Attached
from flume_common.lanes import Port
import msgspec
with Port() as port:
    w = FakeWeightNode(port, name="dying")
    print(msgspec.msgpack.encode(w.attach_request()).hex(), flush=True)
    w.connect(msgspec.msgpack.decode(bytes.fromhex(input()), type=Attached))
    w.plan()
    w.await_credit(lambda credit: credit.granted_blocks == 16)
    w.step((0, 0, 20), ops=[w.open(0)])
    w.begin((0, 1, 1)).ask(0)
    print("held", flush=True)
    time.sleep(60)
"""


@asynccontextmanager
async def weight_node_process(node):
    """A fake weight node in a process of its own, in the middle of a step on 20 tokens."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DYING, cwd=Path(__file__).parent, stdin=PIPE, stdout=PIPE
    )
    try:
        async with asyncio.timeout(30):
            request = bytes.fromhex(await _line_of(process))
            node.engine.send(msgspec.msgpack.decode(request, type=Attach))
            attached = msgspec.msgpack.encode(await node.expect(Attached)).hex()
            process.stdin.write(attached.encode() + b"\n")
            assert await _line_of(process) == "held"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _line_of(process):
    while True:
        line = (await process.stdout.readline()).decode().strip()
        assert line, "the process ended"
        if " " not in line:  # not one of UCX's warnings
            return line


async def test_a_sequence_is_prefilled_and_decoded_token_by_token(node, port):
    w = await node.attach(FakeWeightNode(port))
    w.step((0, 0, 10), ops=[w.open(0)])
    w.step((0, 7, 7))
    for _ in range(9):
        w.step((0, 1, 1), kv_layers=3)
    report = await node.report(after=w)
    assert (report.used_tokens, report.used_blocks, report.capacity_tokens) == (26, 7, CAPACITY * 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_half_precision_layouts(port, dtype):
    layout = KvLayout(3, 6, 2, 16, dtype, 4)
    async with engine_with(layout=layout) as node:
        w = await node.attach(FakeWeightNode(port, LaneShape(layout, 64, 8, 1 << 16)))
        w.step((0, 0, 9), ops=[w.open(0)])
        w.step((0, 5, 5))
        w.step((0, 1, 1))


async def test_rows_of_one_step_see_their_own_slot_only(node, port):
    w = await node.attach(FakeWeightNode(port))
    w.step((0, 0, 9), (1, 0, 3), ops=[w.open(0), w.open(1), w.open(2)])
    w.step((1, 1, 1), (2, 4, 4), (0, 1, 0))
    w.step((2, 1, 1), (0, 3, 3), (1, 0, 2), kv_layers=2)
    w.step((0, 1, 1), (1, 1, 1), (2, 1, 1))


async def test_queries_on_a_slot_that_holds_nothing_get_zero_and_minus_infinity(node, port):
    w = await node.attach(FakeWeightNode(port))
    running = w.begin((0, 3, 3), ops=[w.open(0)])
    for layer in range(LAYOUT.num_layers):
        running.ask(layer)
        o, lse = w.partial(running.number, layer, 3)
        assert not o.any() and bool((lse == -torch.inf).all())
    running.send_kv()


async def test_sequences_that_grow_side_by_side_stay_right_when_memory_is_scattered(node, port):
    w = await node.attach(FakeWeightNode(port), want=CAPACITY)
    w.step(*[(slot, 0, 5) for slot in range(5)], ops=[w.open(slot) for slot in range(5)])
    for turn in range(6):
        w.step(*[(slot, 1, 3) for slot in range(5) if (slot + turn) % 3])
    w.step((3, 2, 2), ops=[w.release(0), w.release(2)])
    w.want = CAPACITY - 16
    w.plan()
    w.await_credit(lambda credit: credit.free_blocks == 0)
    w.step((3, 30, 30))
    w.step((3, 1, 1), (1, 1, 1))


async def test_a_tail_that_comes_back_makes_a_second_range_in_its_slot(node, port):
    w = await node.attach(FakeWeightNode(port))
    w.step((0, 0, 6), ops=[w.open(0)])
    w.step((0, 1, 0), ops=[w.close(0)])
    w.step((0, 1, 1), ops=[w.open(0)])
    w.step((0, 2, 2))
    report = await node.report(after=w)
    assert report.lanes[0].ranges == 2 and report.lanes[0].sequences == 1 and report.used_blocks == 3


async def test_two_weight_nodes_interleave_their_steps(node, port):
    first = await node.attach(FakeWeightNode(port), want=8)
    second = await node.attach(FakeWeightNode(port), want=8)
    for w in (first, second):
        w.step((0, 0, 8), ops=[w.open(0)])
    one, two = first.begin((0, 1, 1)), second.begin((0, 4, 4))
    for layer in range(LAYOUT.num_layers):
        one.ask(layer)
        two.ask(layer)
        two.check(layer)
        one.check(layer)
    two.send_kv()
    one.send_kv()
    first.step((0, 1, 1))
    second.step((0, 1, 1))
    await node.report(after=first)
    report = await node.report(after=second)
    held = {lane.weight_node: lane.held_blocks for lane in report.lanes}
    assert held == {first.name: 3, second.name: 4}


async def test_what_steps_of_few_queries_read_is_summed_up(node, port):
    before = (await node.report()).reads
    w = await node.attach(FakeWeightNode(port))
    w.step((0, 0, 20), ops=[w.open(0)])
    w.step((0, 40, 1))
    w.step((0, 1, 1))
    w.step((0, 3, 1))
    reads = (await node.report()).reads.plus(before, -1.0)
    token_bytes = LAYOUT.token_bytes
    assert (reads.steps, reads.bytes) == (2, (21 + 22) * token_bytes), "40 queries are not bound by reading"
    assert 0 < reads.seconds < 1
    assert reads.bytes_squared == (21**2 + 22**2) * token_bytes**2


async def test_a_plan_abandons_an_unfinished_step_and_nothing_of_it_is_kept(node, port):
    w = await node.attach(FakeWeightNode(port))
    w.step((0, 0, 5), ops=[w.open(0)])
    broken = w.begin((0, 1, 9))
    broken.ask(0)
    broken.check(0)
    broken.send_kv(until=2)
    broken.ask(1)  # nobody waits for this answer
    w.step((0, 2, 2))
    w.step((0, 1, 1))
    report = await node.report(after=w)
    assert (report.used_tokens, report.used_blocks) == (8, 2)


async def test_a_step_abandoned_before_its_queries_came_does_not_disturb_the_next(node, port):
    w = await node.attach(FakeWeightNode(port))
    w.step((0, 0, 5), ops=[w.open(0)])
    for _ in range(3):
        w.begin((0, 1, 9))
    w.plan()
    w.step((0, 1, 1))
    assert (await node.report(after=w)).used_tokens == 6


async def test_a_plan_that_overtakes_the_kv_sent_before_it_waits_for_it(node, port):
    w = await node.attach(FakeWeightNode(port))
    w.step((0, 0, 5), ops=[w.open(0)])
    overtaken = w.begin((0, 0, 2))
    w.slots[0].kv, before = torch.cat([w.slots[0].kv, overtaken.kv[0]], 2), w.slots[0].kv
    w.kv_sent = overtaken.number
    running = w.begin((0, 1, 1))
    running.ask(0)
    w.credits_waiting(0.1)  # the node has long seen the PLAN
    w.slots[0].kv = before
    overtaken.send_kv()
    running.check(0)
    for layer in range(1, LAYOUT.num_layers):
        running.ask(layer)
        running.check(layer)
    running.send_kv()
    w.step((0, 1, 1))
    assert (await node.report(after=w)).used_tokens == 9


@pytest.mark.parametrize(
    "rows, refusal",
    [
        pytest.param([(7, 1, 0, 0)], Refusal.UNKNOWN_SLOT, id="unknown slot"),
        pytest.param([(0, 1, 1, 4)], Refusal.LENGTH_MISMATCH, id="another length"),
        pytest.param([(0, 0, 60, 5)], Refusal.OVER_CREDIT, id="over credit"),
        pytest.param([(0, 65, 0, 5)], Refusal.TOO_LARGE, id="more queries than attached for"),
        pytest.param([(1, 0, 1, 0)], Refusal.NO_OPEN_RANGE, id="closed range"),
    ],
)
async def test_a_refused_step_says_why_and_the_next_one_goes_on(node, port, rows, refusal):
    w = await node.attach(FakeWeightNode(port), want=8)
    w.step((0, 0, 5), ops=[w.open(0), w.open(1)])
    w.plan(ops=[w.close(1)])
    number = w.plan(rows)
    # What was sent along with the refused step is dropped by its step number.
    w.query(number, 0, w.rand(1, LAYOUT.num_query_heads, LAYOUT.head_dim))
    w.append(number, 0, w.new_kv(1)[:1])
    credit = w.await_credit(lambda credit: credit.refused_step == number)
    assert credit.refusal is refusal
    w.step((0, 1, 1))
    again = w.await_credit(lambda credit: credit.committed_step == w.number)
    assert again.refusal is Refusal.NONE, "a refusal is said once"
    assert (await node.report()).used_tokens == 6


async def test_a_plan_of_an_older_epoch_is_refused_and_counted(node, port):
    w = await node.attach(FakeWeightNode(port, epoch=5))
    w.step((0, 0, 5), ops=[w.open(0)])
    before = (await node.report(after=w)).epoch_rejected
    number = w.plan(ops=[(3, 0, 0, 0)], epoch=4)
    assert w.await_credit(lambda c: c.refused_step == number).refusal is Refusal.STALE_EPOCH
    report = await node.report()
    assert report.epoch_rejected == before + 1 and report.used_tokens == 5


async def test_an_owner_that_was_replaced_is_not_answered_and_stores_nothing(node, port):
    w = await node.attach(FakeWeightNode(port, epoch=5))
    w.step((0, 0, 5), ops=[w.open(0)])
    before = (await node.report(after=w)).epoch_rejected
    running = w.begin((0, 1, 1))
    w.epoch = 4  # it does not know yet
    w.query(running.number, 0, w.rand(1, LAYOUT.num_query_heads, LAYOUT.head_dim))
    w.append(running.number, 0, w.new_kv(1))
    w.epoch = 5
    w.finish(running)
    w.step((0, 1, 1))
    report = await node.report(after=w)
    assert (report.epoch_rejected, report.used_tokens) == (before + 2, 7)


async def test_what_a_node_says_carries_its_own_epoch(node, port):
    w = FakeWeightNode(port, epoch=5)
    node.engine.send(w.attach_request(node_epoch=77))
    w.connect(await node.expect(Attached))
    w.want = 4
    w.plan()
    w.await_credit(lambda credit: credit.granted_blocks == 4)
    assert w.last_epoch == 77
    w.step((0, 0, 5), ops=[w.open(0)])
    w.last_epoch = 0
    w.step((0, 1, 1))
    assert w.last_epoch == 77


async def test_an_attach_of_an_older_epoch_is_refused_even_after_the_lane_is_gone(node, port):
    w = await node.attach(FakeWeightNode(port, epoch=5))
    node.engine.send(Detach(request=2, weight_node=w.name, epoch=5))
    await node.expect(Detached)
    before = (await node.report()).epoch_rejected
    node.engine.send(w.attach_request(epoch=4))
    refused = await node.expect(Refused)
    assert refused.field == "epoch" and "older than 5" in refused.detail
    assert (await node.report()).epoch_rejected == before + 1


async def test_memory_for_not_even_one_block_is_refused_with_the_numbers(node, port):
    layout = KvLayout(1000, 64, 64, 128, "float32", 16)
    node.engine.send(FakeWeightNode(port).attach_request(layout=layout))
    refused = await node.expect(Refused)
    assert refused.field == "layout" and f"which takes {layout.block_bytes}" in refused.detail


async def test_every_plan_is_answered_soon_also_one_that_changes_nothing_or_is_refused(node, port):
    w = await node.attach(FakeWeightNode(port))
    w.await_credit(lambda credit: credit.plans_taken == 1)  # that of being attached
    for taken, rows in enumerate(((), (), [(0, 1, 0, 5)], ()), 2):
        w.plan(rows)
        w.await_credit(lambda credit, taken=taken: credit.plans_taken == taken)


async def test_credit_runs_out_and_grows_again_when_memory_comes_back(node, port):
    w = await node.attach(FakeWeightNode(port), want=CAPACITY)
    w.step((0, 0, 60), ops=[w.open(0)])
    w.step((1, 0, 64), ops=[w.open(1)])
    assert w.await_credit(lambda c: c.free_blocks == 0).granted_blocks == CAPACITY
    number = w.plan([(1, 0, 5, 64)])
    assert w.await_credit(lambda c: c.refused_step == number).refusal is Refusal.OVER_CREDIT
    w.plan(ops=[w.release(0)])
    w.await_credit(lambda c: c.granted_blocks == CAPACITY + 15)
    w.step((1, 1, 60))


async def test_credit_given_back_goes_to_who_wants_it(node, port):
    first = await node.attach(FakeWeightNode(port), want=CAPACITY)
    second = FakeWeightNode(port)
    node.engine.send(second.attach_request())
    second.connect(await node.expect(Attached))
    second.want = 8
    second.plan()
    second.await_credit(lambda c: c.granted_blocks == 0)
    first.want, first.returned = 4, 10
    first.plan()
    second.await_credit(lambda c: c.granted_blocks == 8)
    second.step((0, 0, 32), ops=[second.open(0)])


async def test_a_decode_step_sends_no_credit_of_its_own(node, port):
    w = await node.attach(FakeWeightNode(port), want=4)
    w.step((0, 0, 1), ops=[w.open(0)])
    w.credits_waiting(0.5)
    started_s = time.monotonic()
    for _ in range(2):
        w.step((0, 1, 1))
    credits_waiting = w.credits_waiting(0.05)
    rounds = (time.monotonic() - started_s) // QUIET_CREDIT_S  # of credit that nobody waits for
    assert credits_waiting <= rounds
    assert w.credits_waiting(0.5) <= 2 and w.credit.committed_step == w.number


async def test_an_idle_node_uses_no_cpu(node, port):
    await node.attach(FakeWeightNode(port))
    await asyncio.sleep(0.5)
    process = psutil.Process(node.engine.pid)
    before = sum(process.cpu_times()[:2])
    await asyncio.sleep(1.0)
    assert sum(process.cpu_times()[:2]) - before <= 0.03


async def test_release_frees_everything(node, port):
    w = await node.attach(FakeWeightNode(port))
    for turn in range(20):
        w.step((turn, 0, 20), ops=[w.open(turn)])
        w.step((turn, 1, 1))
        w.plan(ops=[w.release(turn)])
        w.await_credit(lambda c, turn=turn: c.granted_blocks == 16 + 6 * (turn + 1))
    report = await node.report()
    assert (report.used_blocks, report.used_tokens, report.lanes[0].sequences) == (0, 0, 0)


@only_on_cpu
async def test_what_a_dead_weight_node_held_is_kept_for_another_one_to_take_over(node, port):
    other = await node.attach(FakeWeightNode(port), want=4)
    other.step((0, 0, 8), ops=[other.open(0)])
    async with weight_node_process(node) as process:
        assert (await node.report()).used_blocks == 7
        assert (await kept(node, other)).in_use
        process.kill()
    closed = await node.expect(LaneClosed, timeout_s=5)
    assert closed.weight_node == "dying"
    report = await node.report()
    assert (report.used_blocks, report.orphan_tokens) == (7, 20)
    assert [lane.weight_node for lane in report.lanes] == [other.name]
    ours = Op.ADOPT, 5, 14, sequence_key("dying/0")
    number = other.plan([(0, 1, 0, 8)], ops=[ours])
    refused = other.await_credit(lambda credit: credit.refused_step == number)
    assert refused.refusal is Refusal.UNKNOWN_SLOT, "not claimed"

    reply = await kept(node, other)
    assert (reply.ranges, reply.in_use) == ([(0, 20)], False)
    twin = FakeWeightNode(port, name="dying")  # makes the same numbers
    twin.open(0)
    other.slots[5] = FakeSlot(RunningStep(twin, 1, ((0, 0, 20),)).kv[0][:, :, :14], opened_at=14)
    other.step((5, 1, 0), (0, 1, 1), ops=[ours])
    other.step((5, 2, 2), ops=[(Op.OPEN, 5, 14, ours[3])])
    report = await node.report()
    (lane,) = report.lanes
    assert (report.used_blocks, report.used_tokens, report.orphan_tokens) == (8, 25, 0)
    assert (lane.granted_blocks, lane.held_blocks) == (8 + other.want, 8)
    other.plan(ops=[other.release(5)])
    other.want = CAPACITY - 3
    other.plan()
    other.await_credit(lambda credit: credit.free_blocks == 0)


@only_on_cpu
async def test_a_stopped_weight_node_whose_epoch_is_over_is_fenced_off(node, port):
    other = await node.attach(FakeWeightNode(port), want=4)
    rejected = (await node.report()).epoch_rejected
    async with weight_node_process(node) as process:
        process.send_signal(signal.SIGSTOP)
        for below in (0, 1):
            assert (await kept(node, other, lost_below=below)).in_use, "its epoch 1 is not over"
        reply = await kept(node, other, lost_below=2)
        assert (reply.ranges, reply.in_use) == ([(0, 20)], False)
        closed = next(message for message in node.seen if isinstance(message, LaneClosed))
        assert (closed.weight_node, closed.epoch) == ("dying", 1)
        woken = FakeWeightNode(port, name="dying")
        node.engine.send(woken.attach_request())
        assert (await node.expect(Refused)).field == "epoch"
        node.engine.send(woken.attach_request(epoch=2))
        woken.connect(await node.expect(Attached))
        report = await node.report()
        assert report.orphan_tokens == 20, "what was claimed is not freed by its return"
        assert report.epoch_rejected == rejected + 1
    other.plan(ops=[(Op.ADOPT, 5, 20, sequence_key("dying/0")), (Op.RELEASE, 5, 0, 0)])
    await node.expect(Report, where=lambda report: report.used_blocks == 0)


async def kept(node, asking, sequence="dying/0", **lost):
    lost = {"lost_node": "dying"} | lost
    node.engine.send(Adopt(request=9, weight_node=asking.name, epoch=asking.epoch, sequence=sequence, **lost))
    return await node.expect(Kept)


async def test_a_detach_and_the_grace_time_free_what_a_dead_weight_node_left(port):
    async with engine_with(args=("--orphan-grace-s", "1.5")) as node:
        for freed_by in ("a detach", "time"):
            async with weight_node_process(node) as process:
                process.kill()
            await node.expect(LaneClosed, timeout_s=5)
            assert (await node.report()).used_blocks == 5
            if freed_by == "a detach":
                node.engine.send(Detach(request=1, weight_node="dying", epoch=1))
                await node.expect(Detached)
            else:
                await node.expect(Report, where=lambda report: report.used_blocks == 0)
            assert (await node.report()).used_blocks == 0


async def test_draining_grants_nothing_and_serves_what_is_there(node, port):
    w = await node.attach(FakeWeightNode(port), want=4)
    w.step((0, 0, 5), ops=[w.open(0)])
    w.credits_waiting(0.3)  # nothing is on its way that could carry the news by chance
    node.engine.send(SetDraining(request=1, draining=True))
    await node.expect(Report, where=lambda r: r.draining)
    credit = w.await_credit(lambda c: c.draining)
    w.want = 20
    w.step((0, 1, 1))
    assert w.credits_waiting(0.3) <= 1 and w.credit.granted_blocks == credit.granted_blocks
    node.engine.send(SetDraining(request=2, draining=False))
    w.await_credit(lambda c: not c.draining and c.granted_blocks == 22)


# Attach


async def test_the_same_weight_node_attaching_again_replaces_its_lane(node, port):
    w = await node.attach(FakeWeightNode(port))
    w.step((0, 0, 20), ops=[w.open(0)])
    again = await node.attach(FakeWeightNode(port, name=w.name))
    assert (await node.report()).used_blocks == 0
    again.step((0, 0, 5), ops=[again.open(0)])
    again.step((0, 1, 1))


async def test_another_layout_is_taken_only_when_no_lane_is_left(node, port):
    w = await node.attach(FakeWeightNode(port))
    w.step((0, 0, 20), ops=[w.open(0)])
    layout = KvLayout(2, 2, 1, 32, "float32", 8)
    shape = LaneShape(layout, 64, 8, 1 << 16)
    other = FakeWeightNode(port, shape)
    node.engine.send(other.attach_request())
    refused = await node.expect(Refused)
    assert refused.field == "layout.num_layers" and "has 3, the peer has 2" in refused.detail
    node.engine.send(Detach(request=2, weight_node=w.name, epoch=1))
    await node.expect(Detached)
    await node.attach(other, want=4)
    other.step((0, 0, 9), ops=[other.open(0)])
    other.step((0, 1, 1))


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"epoch": 6}, "epoch"),
        ({"max_step_tokens": 0}, "max_step_tokens"),
        ({"max_step_tokens": 1 << 30}, "max_step_tokens"),
        ({"kv_frame_bytes": 8}, "kv_frame_bytes"),
        ({"layout": KvLayout(3, 4, 1, 16, "float32", 4)}, "layout.num_kv_heads"),
        ({"worker_address": b""}, "worker_address"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_an_attach_that_cannot_be_is_refused_by_the_fields_name(node, port, changes, field):
    seen = await node.attach(FakeWeightNode(port, epoch=7))
    seen.step((0, 0, 5), ops=[seen.open(0)])
    names = {"name": seen.name} if "epoch" in changes else {}
    node.engine.send(FakeWeightNode(port, **names).attach_request(**changes))
    assert (await node.expect(Refused)).field == field
    seen.step((0, 1, 1))
    assert (await node.report(after=seen)).used_tokens == 6


async def test_a_weight_node_that_contradicts_itself_loses_its_lane(node, port):
    w = await node.attach(FakeWeightNode(port))
    w.step((0, 0, 5), ops=[w.open(0)])
    number = w.plan([(0, 1, 1, 5)])
    w.query(number, 1, w.rand(1, LAYOUT.num_query_heads, LAYOUT.head_dim))
    closed = await node.expect(LaneClosed)
    assert "expected layer 0" in closed.reason
    assert (await node.report()).used_blocks == 0


async def test_two_microbatches_are_answered_each_on_its_own(node, port):
    w = await node.attach(FakeWeightNode(port))
    w.step((0, 0, 5), (1, 0, 3), (2, 0, 7), ops=[w.open(0), w.open(1), w.open(2)])
    for second in (1, 3, 2, 0):
        w.step((0, 1, 1), (1, 1, 1), (2, 1, 1), second=second)
    w.step((2, 4, 4), (0, 0, 1), (1, 1, 1), second=1, kv_layers=3)
    assert (await node.report(after=w)).used_tokens == 15 + 4 * 3 + 6


async def test_microbatches_that_are_asked_about_out_of_turn_end_the_lane(node, port):
    w = await node.attach(FakeWeightNode(port))
    w.step((0, 0, 5), (1, 0, 3), ops=[w.open(0), w.open(1)])
    running = w.begin((0, 1, 1), (1, 1, 1), second=1)
    running.ask(0, running.parts[1])
    assert "expected layer 0, microbatch 0" in (await node.expect(LaneClosed)).reason


async def test_a_second_microbatch_of_more_rows_than_the_step_has_is_refused(node, port):
    w = await node.attach(FakeWeightNode(port))
    w.step((0, 0, 5), ops=[w.open(0)])
    w.begin((0, 1, 1), second=2)
    credit = w.await_credit(lambda credit: credit.refusal is not Refusal.NONE)
    assert credit.refusal is Refusal.TOO_LARGE
    w.step((0, 1, 1))


async def test_the_engine_ends_with_its_supervisor():
    async with engine_with() as node:
        process = node.engine.process
    assert process.returncode == 0
