"""Pulls between two engine processes over real UCX lanes; the tests play both supervisors."""

from __future__ import annotations

import time

import pytest
import pytest_asyncio
from fake_weight_node import LAYOUT, FakeSlot, FakeWeightNode
from flume_attention.messages import (
    Detach,
    Detached,
    EndPull,
    Lend,
    Lent,
    Prepared,
    PreparePull,
    Pull,
    Pulled,
    Refused,
    SetDraining,
)
from flume_common.lanes import Port, Side
from flume_common.pull_wire import Chunk, PulledHeader, PullOp, PullShape
from flume_common.pull_wire import Pull as PullMessage
from flume_common.wire import Header, Kind, Op, sequence_key
from real_engine import engine_with

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("engine_zygote")]
TOKENS = 11  # of the range that moves: three blocks, the last one not full


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["cpu", "cuda"])
async def engines(engine_zygote, request):
    device = request.param
    async with engine_with(device=device) as lender, engine_with(device=device) as puller:
        yield lender, puller


@pytest.fixture(scope="module")
def port():
    with Port() as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def pair(engines, port):
    """One weight node on both engines; it has stored a closed range in slot 0 of the lender."""
    lender, puller = engines
    at_lender, at_puller = FakeWeightNode(port), FakeWeightNode(port)
    at_puller.name = at_lender.name
    await lender.attach(at_lender)
    await puller.attach(at_puller)
    at_lender.step((0, 0, TOKENS), ops=[at_lender.open(0, "s")])
    at_lender.step((0, 1, 0), ops=[at_lender.close(0)])
    yield at_lender, at_puller
    at_lender.lane.close()
    at_puller.lane.close()
    for engine in engines:
        await empty(engine)


async def empty(engine):
    """Detach every lane; nothing is held then, not even what nobody has taken."""
    for lane in (await engine.report()).lanes:
        engine.engine.send(Detach(request=1, weight_node=lane.weight_node, epoch=lane.epoch))
        await engine.expect(Detached)
    assert (await engine.report()).used_blocks == 0


async def prepare(lender, puller, number=1):
    puller.engine.send(PreparePull(request=number))
    prepared = await puller.expect(Prepared)
    lender.engine.send(
        Lend(
            request=number, puller="puller", epoch=3, layout=prepared.layout, lane=prepared.lane,
            worker_address=prepared.worker_address, chunk_bytes=prepared.chunk_bytes, node_epoch=7,
        )
    )  # fmt: skip
    return prepared, await lender.expect(Lent)


async def pull(lender, puller, name, ranges, number=1):
    """As a supervisor does it; returns what Pulled says."""
    await start_pull(lender, puller, name, ranges, number)
    return await puller.expect(Pulled)


async def start_pull(lender, puller, name, ranges, number=1):
    prepared, lent = await prepare(lender, puller, number)
    puller.engine.send(
        Pull(
            request=number, weight_node=name, epoch=1, lender="lender", lender_epoch=7,
            lender_worker_address=lent.worker_address, lender_lane=lent.lane, lane=prepared.lane,
            ranges=ranges, node_epoch=3,
        )
    )  # fmt: skip


def take(node, slot, source, sequence="s"):
    node.slots[slot] = FakeSlot(source.kv.clone())
    return (Op.TAKE, slot, 0, sequence_key(sequence))


async def test_a_range_is_the_same_on_the_node_that_pulled_it(engines, pair):
    lender, puller = engines
    at_lender, at_puller = pair
    pulled = await pull(lender, puller, at_puller.name, [("s", 0, TOKENS)])
    assert pulled.ranges == [(0, sequence_key("s"))] and not pulled.reason
    # It is asked on the lender for as long as the route says so; then it is asked here, to the bit as good.
    at_lender.step((0, 3, 0))
    at_puller.step((0, 3, 0), ops=[take(at_puller, 0, at_lender.slots[0])])
    at_lender.step(ops=[(Op.DROP, 0, 0, TOKENS)])
    report = await lender.report()
    assert (report.used_blocks, report.lanes[0].ranges) == (0, 0)
    report = await puller.report()
    assert (report.used_tokens, report.pulled_tokens) == (TOKENS, TOKENS)
    # Appending to a range of its own behind it goes on as ever.
    at_puller.step((0, 2, 2), ops=[at_puller.open(0, "s")])
    at_puller.step((0, 2, 1))
    at_puller.plan(ops=[at_puller.release(0)])
    await puller.becomes(lambda report: report.used_blocks == 0)


async def test_taking_costs_no_credit(engines, pair):
    lender, puller = engines
    at_lender, at_puller = pair
    before = at_puller.await_credit(lambda credit: True).granted_blocks
    await pull(lender, puller, at_puller.name, [("s", 0, TOKENS)])
    at_puller.step((0, 1, 0), ops=[take(at_puller, 0, at_lender.slots[0])])
    blocks = LAYOUT.blocks_of(TOKENS)
    at_puller.await_credit(lambda credit: credit.granted_blocks == before + blocks)


async def test_what_is_not_there_is_left_out(engines, pair):
    lender, puller = engines
    at_lender, at_puller = pair
    refused = (await lender.report()).pulls_refused
    at_lender.step((1, 0, 4), ops=[at_lender.open(1, "open")])
    asked = [("gone", 0, 8), ("s", 4, TOKENS - 4), ("s", 0, TOKENS - 1), ("open", 0, 4), ("s", 0, TOKENS)]
    pulled = await pull(lender, puller, at_puller.name, asked)
    assert pulled.ranges == [(0, sequence_key("s"))]
    assert (await lender.report()).pulls_refused == refused + 4
    assert (await puller.report()).used_tokens == TOKENS


async def test_nothing_is_pulled_into_memory_that_is_promised(engines, pair):
    lender, puller = engines
    _, at_puller = pair
    at_puller.want = 32 - LAYOUT.blocks_of(TOKENS) + 1  # one block too few is left
    at_puller.plan()
    at_puller.await_credit(lambda credit: credit.granted_blocks == at_puller.want)
    assert (await pull(lender, puller, at_puller.name, [("s", 0, TOKENS)])).ranges == []
    assert (await puller.report()).used_blocks == 0


async def test_a_draining_node_and_one_without_memory_pull_nothing(engines, pair):
    _, puller = engines
    async with engine_with() as fresh:
        fresh.engine.send(PreparePull(request=5))
        assert (await fresh.expect(Refused)).field == "layout"
    puller.engine.send(SetDraining(request=6, draining=True))
    puller.engine.send(PreparePull(request=7))
    assert (await puller.expect(Refused)).field == "state"
    puller.engine.send(SetDraining(request=8, draining=False))


async def test_a_dead_lender_leaves_nothing_held(engines, port):
    _, puller = engines
    async with engine_with() as lender:
        at_lender, at_puller = FakeWeightNode(port), FakeWeightNode(port)
        await lender.attach(at_lender)
        await puller.attach(at_puller)
        at_lender.step((0, 0, TOKENS), ops=[at_lender.open(0, "s")])
        at_lender.step((0, 1, 0), ops=[at_lender.close(0)])
        prepared, lent = await prepare(lender, puller)
        lender.engine.process.kill()
        puller.engine.send(
            Pull(
                request=1, weight_node=at_puller.name, epoch=1, lender="lender", lender_epoch=7,
                lender_worker_address=lent.worker_address, lender_lane=lent.lane, lane=prepared.lane,
                ranges=[("s", 0, TOKENS)], node_epoch=3,
            )
        )  # fmt: skip
        pulled = await puller.expect(Pulled)
        assert pulled.ranges == [] and pulled.reason
        assert (await puller.report()).used_blocks == 0
        at_lender.lane.close()
    await empty(puller)


class FakePuller:
    """A puller that does what a test says, on a lane of its own to a real lender."""

    def __init__(self, port, lent, prepared_lane, layout):
        self.port, self.number = port, 0
        self.lane = port.connect(
            "lender", lent.worker_address, PullShape(layout), Side.PULLER,
            send_lane=lent.lane, receive_lane=prepared_lane,
        )  # fmt: skip

    def send(self, pull, *, epoch=3):
        self.number += 1
        frame = self.lane.sender(Kind.PULL).frame()
        frame.header[Header.STEP], frame.header[Header.EPOCH] = self.number, epoch
        self.lane.sender(Kind.PULL).send(frame, pull.encode(frame.words))
        return self.number

    def answer(self, timeout_s=5.0):
        got = []
        receiver = self.lane.receiver(Kind.PULLED)
        if not self.port.wait(lambda: (f := receiver.poll()) is not None and not got.append(f), timeout_s):
            return None
        header = got[0].header.copy()
        receiver.give_back(got[0])
        return header


async def fake_puller(lender, port, lane):
    lender.engine.send(
        Lend(
            request=9, puller="fake", epoch=3, layout=LAYOUT, lane=lane,
            worker_address=port.address, chunk_bytes=PullShape(LAYOUT).chunk_bytes, node_epoch=7,
        )
    )  # fmt: skip
    return FakePuller(port, await lender.expect(Lent), lane, LAYOUT)


def read(start=0, tokens=TOKENS, generation=0, chunk=None, key="s"):
    chunk = chunk or Chunk(0, LAYOUT.num_layers, 0, tokens)
    return PullMessage(PullOp.READ, sequence_key(key), start, tokens, generation, chunk)


async def test_a_range_stored_again_is_another_one(engines, pair, port):
    """The blocks are in use again and the range has the same name: its reads are refused all the same."""
    lender, _ = engines
    at_lender, _ = pair
    puller = await fake_puller(lender, port, 501)
    puller.send(read())
    generation = int(puller.answer()[PulledHeader.GENERATION])
    assert generation > 0
    at_lender.plan(ops=[at_lender.release(0)])
    at_lender.step((0, 0, TOKENS), ops=[at_lender.open(0, "s")])
    at_lender.step((0, 1, 0), ops=[at_lender.close(0)])
    puller.send(read(generation=generation))
    refusal = puller.answer()
    assert refusal[PulledHeader.REFUSED] == 1 and refusal[Header.BODY_BYTES] == 0
    puller.send(read())
    assert puller.answer()[PulledHeader.GENERATION] > generation
    puller.lane.close()


async def test_an_older_epoch_is_ignored_and_counted(engines, pair, port):
    lender, _ = engines
    rejected = (await lender.report()).epoch_rejected
    puller = await fake_puller(lender, port, 502)
    puller.send(read(), epoch=2)
    assert puller.answer(timeout_s=0.2) is None
    puller.send(read())
    assert puller.answer()[Header.STEP] == 2
    assert (await lender.report()).epoch_rejected == rejected + 1
    puller.lane.close()


@pytest.mark.parametrize(
    "chunk",
    [Chunk(0, LAYOUT.num_layers + 1, 0, 1), Chunk(0, 1, 5, TOKENS + 1), Chunk(1, 1, 0, 1), Chunk(0, 1, 3, 3)],
    ids=["layers", "tokens", "no layer", "no token"],
)
async def test_a_read_beyond_a_range_ends_the_lane(engines, pair, port, chunk):
    lender, _ = engines
    puller = await fake_puller(lender, port, 510 + chunk.end_layer * 20 + chunk.end)
    puller.send(read(chunk=chunk))
    assert puller.answer(timeout_s=0.2) is None
    assert (await lender.report()).used_tokens == TOKENS
    puller.lane.close()


async def fake_lender(puller, port, number, weight_node, ranges):
    """The lending end of a lane on which the puller has been told to pull."""
    puller.engine.send(PreparePull(request=1))
    prepared = await puller.expect(Prepared)
    lane = port.connect(
        "puller", prepared.worker_address, PullShape(LAYOUT), Side.LENDER,
        send_lane=prepared.lane, receive_lane=number,
    )  # fmt: skip
    puller.engine.send(
        Pull(
            request=1, weight_node=weight_node, epoch=1, lender="fake", lender_epoch=7,
            lender_worker_address=port.address, lender_lane=number, lane=prepared.lane,
            ranges=ranges, node_epoch=3,
        )
    )  # fmt: skip
    return lane


async def test_a_pull_that_nobody_waits_for_ends_and_frees_what_it_had_begun(engines, pair, port):
    """The lender here is a fake that never answers."""
    _, puller = engines
    _, at_puller = pair
    lane = await fake_lender(puller, port, 777, at_puller.name, [("s", 0, TOKENS)])
    asked = receive(port, lane)
    assert PullMessage.decode(asked).op is PullOp.READ
    assert (await puller.report()).used_blocks == LAYOUT.blocks_of(TOKENS)
    puller.engine.send(EndPull(request=1))
    assert PullMessage.decode(receive(port, lane)).op is PullOp.ABORT
    assert (await puller.report()).used_blocks == 0
    lane.close()


async def test_complete_is_said_once_after_the_last_byte(engines, pair, port):
    """The lender here is a fake that answers late; COMPLETE must not come before its last answer."""
    _, puller = engines
    _, at_puller = pair
    lane = await fake_lender(puller, port, 778, at_puller.name, [("s", 0, TOKENS), ("t", 0, 2)])
    ops = []
    for number in (1, 2):
        pull = PullMessage.decode(receive(port, lane))
        ops.append(pull.op)
        assert receive(port, lane, timeout_s=0.1) is None
        frame = lane.sender(Kind.PULLED).frame()
        frame.header[Header.STEP], frame.header[Header.EPOCH] = number, 7
        frame.header[PulledHeader.GENERATION] = 5
        frame.body[:] = 0
        lane.sender(Kind.PULLED).send(frame, pull.chunk.body_bytes(LAYOUT))
    assert PullMessage.decode(receive(port, lane)).op is PullOp.COMPLETE
    assert len((await puller.expect(Pulled)).ranges) == 2
    assert receive(port, lane, timeout_s=0.1) is None and ops == [PullOp.READ, PullOp.READ]
    lane.close()


def receive(port, lane, timeout_s=5.0):
    got = []

    def arrived():
        frame = lane.receiver(Kind.PULL).poll() if lane.alive else None
        if frame is not None:
            got.append(frame.words[:8].copy())
            lane.receiver(Kind.PULL).give_back(frame)
        return bool(got)

    port.wait(arrived, timeout_s)
    return got[0] if got else None


async def test_a_large_range_moves_while_steps_go_on(engines, port):
    """In many chunks, a bounded number of them in a step."""
    layout = LAYOUT
    async with (
        engine_with(2000, layout, ["--pull-tokens-per-step", "500"]) as lender,
        engine_with(2000, layout, ["--pull-tokens-per-step", "500"]) as puller,
    ):
        at_lender, at_puller = FakeWeightNode(port), FakeWeightNode(port)
        at_puller.name = at_lender.name
        await lender.attach(at_lender, want=1800)
        await puller.attach(at_puller)
        at_lender.step((0, 0, 60), ops=[at_lender.open(0, "s")])
        for _ in range(60):
            at_lender.step((0, 0, 60))
        tokens = at_lender.slots[0].held
        at_lender.step((0, 1, 0), ops=[at_lender.close(0)])
        await start_pull(lender, puller, at_puller.name, [("s", 0, tokens)])
        started_s, steps = time.monotonic(), 0
        while (await puller.report()).pulled_tokens < tokens:
            at_lender.step((0, 1, 0))
            steps += 1
            assert time.monotonic() - started_s < 20
        assert steps >= 3
        at_puller.step((0, 4, 0), ops=[take(at_puller, 0, at_lender.slots[0])])
        at_lender.lane.close()
        at_puller.lane.close()
