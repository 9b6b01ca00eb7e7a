"""What an attention engine does on a GPU, and nowhere else. What it does everywhere is in test_engine.py and
test_pulls.py, which run on a simulated GPU, too."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from functools import partial
from typing import ClassVar

import beside
import msgspec
import psutil
import pytest
import torch
from fake_weight_node import LAYOUT, FakeWeightNode
from flume_attention import supervisor
from flume_attention.cuda import backend as gpu_backend
from flume_attention.cuda.backend import GpuBackend
from flume_attention.engine import DEVICE_STUCK, STEP_END_S
from flume_attention.errors import ConfigRefused, EngineGone
from flume_attention.messages import Attached, CannotRun, FromEngine, LaneClosed
from flume_attention.node import Node
from flume_common.engine_link import LinkClosed, run_engine
from flume_common.lanes import Port, Side
from flume_common.tasks import background
from flume_common.zygote import ENGINE_ZYGOTE
from real_engine import ENV, engine_with
from reference_attention import ReferenceAttention
from simulated_device import SimulatedDevice

pytestmark = pytest.mark.usefixtures("engine_zygote")


@pytest.fixture
def port():
    with Port() as opened:
        yield opened


async def test_a_device_that_does_not_end_a_step_ends_the_engine(port):
    env = {"SIMULATED_STUCK": "1", "SIMULATED_DRAIN_S": "0.2"}
    async with engine_with(device="cuda", env=env) as node:
        w = await node.attach(FakeWeightNode(port))
        w.step((0, 0, 5), ops=[w.open(0)])
        w.begin((0, 1, 1)).ask(0)
        w.begin((0, 1, 1))  # abandons it, so the device has to end it
        with pytest.raises(LinkClosed):
            await node.expect(LaneClosed)
        async with asyncio.timeout(10):
            assert await node.engine.process.wait() == DEVICE_STUCK


async def test_a_new_lane_waits_for_steps_under_way_but_not_for_those_that_do_not_go_on(port):
    async with engine_with(device="cuda") as node:
        first = await node.attach(FakeWeightNode(port), want=8)
        first.step((0, 0, 5), ops=[first.open(0)])
        running = first.begin((0, 1, 1))
        running.ask(0)
        running.check(0)
        second = FakeWeightNode(port)
        node.engine.send(second.attach_request())
        for layer in range(1, LAYOUT.num_layers):
            running.ask(layer)
            running.check(layer)
        running.send_kv()
        second.connect(await node.expect(Attached))
        first.step((0, 1, 1))
        stuck = first.begin((0, 1, 1))
        stuck.ask(0)
        stuck.check(0)
        started_s = time.monotonic()
        third = await node.attach(FakeWeightNode(port), want=8)
        closed = next(seen for seen in node.seen if isinstance(seen, LaneClosed))
        assert closed.weight_node == first.name and "did not go on" in closed.reason
        assert time.monotonic() - started_s >= STEP_END_S
        third.step((0, 0, 5), ops=[third.open(0)])
        third.step((0, 1, 1))


class Appending(ReferenceAttention):
    """Tells where tokens were put."""

    slots: ClassVar = []

    def append(self, pool, k, v, slots):
        self.slots += slots.tolist()
        super().append(pool, k, v, slots)


def test_a_lane_is_made_with_all_its_steps_captured_on_a_stream_of_its_own(port):
    device = SimulatedDevice()
    backend = GpuBackend(device, lambda layout, device: Appending(device))
    node = Node(8 * LAYOUT.block_bytes, make_pool=backend.pool)
    sessions = []
    for number in (1, 2):
        request = FakeWeightNode(port).attach_request()
        holdings = node.add(request.weight_node, node.admit(request))
        lane = port.connect(
            request.weight_node, port.address, holdings.shape, Side.ATTENTION,
            send_lane=number, receive_lane=10 + number, allocate=backend.allocate, rings=backend.rings,
        )  # fmt: skip
        sessions.append(backend.session(node, request.weight_node, 1, lane, holdings))
    # 1, 2, 4 and 8 rows, and in two microbatches 1, 2 and 4 each
    assert [stream.captures for stream in device._streams.all] == [0, 7, 7]
    assert Appending.slots == [-1, -1], "the kernel that stores tokens was loaded, and stored none"
    for session in sessions:
        session.close()


async def test_a_step_under_way_does_not_outlive_the_engine(port):
    async with engine_with(device="cuda") as node:
        w = await node.attach(FakeWeightNode(port))
        w.step((0, 0, 5), ops=[w.open(0)])
        w.begin((0, 1, 1)).ask(0)
        w.credits_waiting(0.1)
        started_s = time.monotonic()
    assert node.engine.process.returncode == 0 and time.monotonic() - started_s < 4.0


async def test_an_engine_polls_while_a_step_is_under_way_and_sleeps_otherwise(port):
    async with engine_with(device="cuda") as node:
        w = await node.attach(FakeWeightNode(port))
        w.step((0, 0, 5), ops=[w.open(0)])
        w.step((0, 1, 1))
        process = psutil.Process(node.engine.pid)
        before = sum(process.cpu_times()[:2])
        await asyncio.sleep(0.3)
        idle = sum(process.cpu_times()[:2]) - before
        running = w.begin((0, 1, 1))
        await asyncio.sleep(0.3)
        assert sum(process.cpu_times()[:2]) - before - idle > idle
        w.finish(running)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
async def test_without_a_gpu_an_engine_says_so_and_ends():
    flags, zygote = ["--kv-bytes", "1000000", "--device", "cuda"], os.environ[ENGINE_ZYGOTE]
    async with run_engine("flume_attention.engine", flags, inbox=FromEngine, zygote=zygote) as engine:
        async with asyncio.timeout(60):
            answer = await engine.receive()
            assert isinstance(answer, CannotRun) and "--device cuda: " in answer.reason
            assert await engine.process.wait() == 0


async def test_an_engine_that_compiles_is_not_taken_for_hung_and_who_asks_again_gets_the_lane(
    port, monkeypatch, capsys
):
    monkeypatch.setattr(supervisor, "ENGINE_MODULE", "simulated_gpu_attention")
    monkeypatch.setattr(supervisor, "ATTACH_S", 0.5)
    for name, value in (beside.environment() | ENV | {"SIMULATED_COMPILE_S": "3.2"}).items():
        monkeypatch.setenv(name, value)
    flags = ["--kv-bytes", str(32 * LAYOUT.block_bytes), "--device", "cuda"]
    kept = supervisor.Supervisor(flags, zygote=os.environ[ENGINE_ZYGOTE], silence_s=1.5)
    refused = 0
    async with background(engine=kept.keep_engine()), asyncio.timeout(60):
        await kept.wait_up()
        pid, w = kept.engine_pid, FakeWeightNode(port)
        while True:
            request = w.attach_request()
            try:
                w.connect(await kept.attach(partial(_numbered, request)))
                break
            except EngineGone as error:
                assert "compiled" in str(error)
                refused += 1
                await asyncio.sleep(0.1)
        assert refused > 1 and kept.engine_pid == pid
        w.plan()
        w.await_credit(lambda credit: credit.granted_blocks == w.want)
        w.step((0, 0, 5), ops=[w.open(0)])
        w.step((0, 1, 1))
    log = capsys.readouterr().out
    assert "lane_takes_long" in log and "lane_prepared" in log and "kv_memory_ms" in log


def _numbered(request, number):
    return msgspec.structs.replace(request, request=number)


async def test_memory_for_kv_is_there_before_a_layout_is_and_lasts_when_another_one_comes(port):
    device = SimulatedDevice()
    made = []
    device.tensor = lambda *size, dtype: (
        made.append((size, dtype)) or SimulatedDevice.tensor(device, *size, dtype=dtype)
    )
    gpu = GpuBackend(device, lambda layout, device: ReferenceAttention(device))
    gpu.reserve(9 * LAYOUT.block_bytes + 7)
    assert made == [((9 * LAYOUT.block_bytes + 7,), torch.uint8)]
    pool = gpu.pool(LAYOUT, 9)
    wide = dataclasses.replace(LAYOUT, block_tokens=2 * LAYOUT.block_tokens)
    other = gpu.pool(wide, 4)
    assert len(made) == 1
    assert len({each.layers[0].kv.data_ptr() for each in (pool, other)}) == 1
    for each in (pool, other):
        assert sum(layer.kv.nbytes for layer in each.layers) == each.num_blocks * each.layout.block_bytes


async def test_memory_that_a_killed_engine_held_is_waited_for_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(gpu_backend, "FREED_WITHIN_S", 0.3)
    free_at = time.monotonic() + 0.15
    device = SimulatedDevice()

    def tensor(*size, dtype):
        if time.monotonic() < free_at:
            raise torch.OutOfMemoryError("all is taken")
        return SimulatedDevice.tensor(device, *size, dtype=dtype)

    device.tensor = tensor
    GpuBackend(device, None).reserve(1000)
    free_at += 60
    with pytest.raises(ConfigRefused, match="--kv-memory: no 1000 bytes"):
        GpuBackend(device, None).reserve(1000)
