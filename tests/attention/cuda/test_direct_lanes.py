"""How a lane comes to have a region, and what an engine does on one: a process with a simulated GPU."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import psutil
import pytest
import torch
from direct_weight_node import DirectWeightNode
from fake_weight_node import LAYOUT, FakeWeightNode
from flume_attention.cuda.backend import GpuBackend
from flume_attention.messages import Attached, Detach, Detached, LaneClosed
from flume_attention.node import Node
from flume_common.direct_region import DirectRegion, RegionHandle, mark
from flume_common.lanes import Port, Side
from flume_common.lanes.processes import Process
from real_engine import engine_with
from reference_attention import ReferenceAttention
from simulated_device import SimulatedDevice

pytestmark = pytest.mark.usefixtures("engine_zygote")


@pytest.fixture
def port():
    with Port() as opened:
        yield opened


async def attach(node, weight_node, **changes):
    """The weight node's lane, with the region mapped if it is offered one, and what it was offered."""
    weight_node = await node.attach(weight_node, direct=True, **changes)
    attached = next(seen for seen in reversed(node.seen) if isinstance(seen, Attached))
    if attached.direct_region:
        handle = RegionHandle.decode(attached.direct_region)
        weight_node.memory = SimulatedDevice().map(handle.gpu, handle.handle)
        weight_node.rows = handle.rows
    return weight_node, attached


async def test_a_gpu_node_offers_who_asks_a_region_with_room_for_all_rows_of_a_step(port):
    async with engine_with(device="cuda") as node:
        w, attached = await attach(node, DirectWeightNode(port))
        handle = RegionHandle.decode(attached.direct_region)
        assert handle.host == Process.this().boot and handle.rows == w.shape.max_step_sequences
        assert len(w.memory) == DirectRegion(LAYOUT, handle.rows).size_bytes
        w.step((0, 0, 5), (1, 0, 2), ops=[w.open(0), w.open(1)])
        assert [lane.direct for lane in (await node.report(after=w)).lanes] == [False]
        w.step((0, 1, 1), (1, 1, 1))
        w.step((1, 1, 1))
        assert [lane.direct for lane in (await node.report()).lanes] == [True]


async def test_lanes_have_regions_of_their_own(port):
    async with engine_with(device="cuda") as node:
        one, _ = await attach(node, DirectWeightNode(port))
        two, _ = await attach(node, DirectWeightNode(port))
        for w in (one, two):
            w.step((0, 0, 5), ops=[w.open(0)])
        first, second = one.begin((0, 1, 1)), two.begin((0, 1, 1))
        for layer in range(LAYOUT.num_layers):
            for running in (first, second):
                running.ask(layer)
            for running in (second, first):
                running.check(layer)


async def test_there_is_no_region_for_who_does_not_ask_and_no_reason(port):
    async with engine_with(device="cuda") as node:
        await node.attach(FakeWeightNode(port))
        attached = next(seen for seen in node.seen if isinstance(seen, Attached))
        assert (attached.direct_region, attached.no_region) == (b"", "")
        assert [lane.direct for lane in (await node.report()).lanes] == [False]


async def test_there_is_none_for_a_weight_node_on_another_host_and_frames_work(port):
    elsewhere = replace(Process.this(), boot="0" * 36).encode() + port.address[Process.SIZE_BYTES :]
    async with engine_with(device="cuda") as node:
        w, attached = await attach(node, DirectWeightNode(port), worker_address=elsewhere)
        assert (attached.direct_region, attached.no_region) == (b"", "the weight node is on another host")
        w.step((0, 0, 5), ops=[w.open(0)])
        w.step((0, 1, 1))


@pytest.mark.parametrize(
    "device, args, reason",
    [("cuda", ["--hop", "frames"], "--hop frames"), ("cpu", [], "this node has no GPU")],
)
async def test_there_is_none_where_it_is_forbidden_or_there_is_no_gpu(port, device, args, reason):
    async with engine_with(device=device, args=args) as node:
        _, attached = await attach(node, DirectWeightNode(port))
        assert (attached.direct_region, attached.no_region) == (b"", reason)


def test_a_lane_is_as_good_where_its_memory_cannot_be_shared(port):
    class Unshared(SimulatedDevice):
        def with_stream(self):
            return Unshared(self._streams)

        def share(self, size_bytes):
            raise RuntimeError("CUDA IPC is not supported here")

    backend = GpuBackend(Unshared(), lambda layout, device: ReferenceAttention(device))
    node = Node(8 * LAYOUT.block_bytes, make_pool=backend.pool)
    request = FakeWeightNode(port).attach_request()
    holdings = node.add(request.weight_node, node.admit(request))
    lane = port.connect(
        request.weight_node, port.address, holdings.shape, Side.ATTENTION,
        send_lane=1, receive_lane=2, allocate=backend.allocate, rings=backend.rings,
    )  # fmt: skip
    session = backend.session(node, request.weight_node, 1, lane, holdings, direct=True)
    assert (session.region, session.no_region) == (b"", "CUDA IPC is not supported here")
    session.close()


async def test_a_step_asked_directly_on_a_lane_without_a_region_ends_it(port):
    async with engine_with(device="cuda") as node:
        w = await node.attach(DirectWeightNode(port))
        w.step((0, 0, 5), ops=[w.open(0)])
        w.memory = torch.zeros(1)
        w.begin((0, 1, 1))
        assert "cannot be asked about" in (await node.expect(LaneClosed)).reason


async def test_a_query_of_a_step_that_is_asked_directly_ends_the_lane(port):
    async with engine_with(device="cuda") as node:
        w, _ = await attach(node, DirectWeightNode(port))
        w.step((0, 0, 5), ops=[w.open(0)])
        running = w.begin((0, 1, 1))
        w.is_direct = False
        running.ask(0)
        assert "asked about in the region" in (await node.expect(LaneClosed)).reason


async def test_memory_of_a_killed_engine_stays_with_who_has_it_mapped(port):
    async with engine_with(device="cuda") as node:
        w, _ = await attach(node, DirectWeightNode(port))
        w.step((0, 0, 5), ops=[w.open(0)])
        w.step((0, 1, 1))
        running = w.begin((0, 1, 1))
        running.ask(0)
        running.check(0)
        said = w.answered
        node.engine.process.kill()
        await node.engine.process.wait()
        running.ask(1)
        w.memory[4096:] = 7
        assert w.answered == said and bool((w.memory[4096:] == 7).all())


async def test_a_lane_that_ends_leaves_no_device_waiting(port):
    async with engine_with(device="cuda") as node:
        w, _ = await attach(node, DirectWeightNode(port))
        w.step((0, 0, 5), ops=[w.open(0)])
        running = w.begin((0, 1, 1))
        running.ask(0)
        running.check(0)
        node.engine.send(Detach(request=2, weight_node=w.name, epoch=w.epoch))
        await node.expect(Detached)
        running.ask(1)
        again, _ = await attach(node, DirectWeightNode(port))
        again.step((0, 0, 5), ops=[again.open(0)])
        again.step((0, 1, 1))
        assert w.answered == mark(running.number, 0)
    assert node.engine.process.returncode == 0  # nothing is left on the device


async def test_a_new_lane_waits_for_a_direct_step_under_way(port):
    async with engine_with(device="cuda") as node:
        first, _ = await attach(node, DirectWeightNode(port))
        first.step((0, 0, 5), ops=[first.open(0)])
        running = first.begin((0, 1, 1))
        running.ask(0)
        running.check(0)
        node.engine.send(FakeWeightNode(port).attach_request())
        with pytest.raises(TimeoutError):
            await node.expect(Attached, timeout_s=0.2)
        for layer in range(1, LAYOUT.num_layers):
            running.ask(layer)
            running.check(layer)
        await node.expect(Attached)
        running.send_kv()
        first.step((0, 1, 1))


async def test_an_engine_sleeps_while_devices_are_at_it(port):
    async with engine_with(device="cuda") as node:
        w, _ = await attach(node, DirectWeightNode(port))
        w.step((0, 0, 5), ops=[w.open(0)])
        running = w.begin((0, 1, 1))
        running.ask(0)
        running.check(0)
        status = psutil.Process(node.engine.pid)
        await asyncio.sleep(0.1)
        main = next(thread for thread in status.threads() if thread.id == node.engine.pid)
        await asyncio.sleep(0.3)
        after = next(thread for thread in status.threads() if thread.id == node.engine.pid)
        # Its other thread is the device, and polls.
        assert after.user_time + after.system_time - main.user_time - main.system_time < 0.1
        for layer in range(1, LAYOUT.num_layers):
            running.ask(layer)
            running.check(layer)
