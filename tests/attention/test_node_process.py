"""An attention node as operators meet it: a process, real etcd, gRPC, and a fake weight node."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE
from contextlib import asynccontextmanager, suppress

import grpc
import httpx
import psutil
import pytest
from fake_weight_node import LAYOUT, FakeWeightNode
from flume_attention.messages import Attached
from flume_common.lanes import LaneDown, Port
from flume_common.membership import Member, Role, State, watch_members
from flume_common.serving import channel
from flume_common.wire import PROTOCOL_VERSION
from flume_protos.v1 import attention_pb2 as pb
from flume_protos.v1 import attention_pb2_grpc as rpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from metrics_lint import problems, values

pytestmark = pytest.mark.e2e
KV_BYTES = 32 * LAYOUT.block_bytes
DEADLINE_S = 40.0


async def eventually(look, timeout_s=DEADLINE_S):
    """The first true answer of `look`, which may be a coroutine function."""
    async with asyncio.timeout(timeout_s):
        while True:
            got = look()
            got = await got if asyncio.iscoroutine(got) else got
            if got:
                return got
            await asyncio.sleep(0.02)


class Running:
    def __init__(self, process, members, log):
        self.process = process
        self.members = members
        self.log = log

    @property
    def member(self):
        return self.members.current.get((Role.ATTENTION, "a1"))

    async def in_state(self, state):
        return await eventually(lambda: self.member and self.member.state == state and self.member)

    @asynccontextmanager
    async def stub(self):
        async with channel(self.member.address) as opened:
            yield rpc.AttentionStub(opened)

    async def metrics(self):
        """The values on its page, found as Prometheus would."""
        async with httpx.AsyncClient() as client:
            answer = await client.get(f"http://{self.member.metrics_address}/metrics", timeout=5)
        assert problems(answer.text) == []
        return {name.removeprefix("flume_"): value for name, value in values(answer.text).items()}

    async def readyz(self):
        async with httpx.AsyncClient() as client:
            return await client.get(f"http://{self.member.metrics_address}/readyz", timeout=5)

    async def health(self):
        async with channel(self.member.address) as opened:
            reply = await health_pb2_grpc.HealthStub(opened).Check(
                health_pb2.HealthCheckRequest(service="flume.v1.Attention"), timeout=5
            )
        return reply.status == health_pb2.HealthCheckResponse.SERVING

    @property
    def engine_pid(self):
        return next(line["engine_pid"] for line in reversed(self.log) if line["event"] == "engine_started")

    async def stop(self, timeout_s=10):
        if self.process.returncode is None:
            self.process.terminate()
        async with asyncio.timeout(timeout_s):
            return await self.process.wait()


async def read_log(process, lines):
    while line := await process.stderr.readline():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))


@asynccontextmanager
async def attention_node(etcd_endpoint, store, keys, *args):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "flume_attention", "--cluster", keys.cluster, "--node", "a1",
        "--etcd", etcd_endpoint, "--kv-memory", str(KV_BYTES), "--prefill-threads", "1", *args,
        stderr=PIPE, stdout=asyncio.subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = []
    reader = asyncio.create_task(read_log(process, lines))
    try:
        async with watch_members(store, keys) as members:
            yield Running(process, members, lines)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reader


async def enlisted(store, keys, weight_node: FakeWeightNode) -> FakeWeightNode:
    """It, registered in etcd: others are not attached."""
    member = Member(
        id=weight_node.name, role=Role.WEIGHT, state=State.READY, address="", host="", pid=1, version="0",
        protocol_version=PROTOCOL_VERSION, started_at_s=0.0,
    )  # fmt: skip
    key = keys.member(Role.WEIGHT, weight_node.name)
    await store.put(key, member.encode())
    weight_node.epoch = (await store.get(key)).create_revision
    return weight_node


async def attach(stub, weight_node: FakeWeightNode):
    wanted = weight_node.attach_request()
    reply = await stub.Attach(
        pb.AttachRequest(
            weight_node=wanted.weight_node, epoch=wanted.epoch, protocol_version=PROTOCOL_VERSION,
            layout=wanted.layout.to_proto(), worker_address=wanted.worker_address, lane=wanted.lane,
            max_step_tokens=wanted.max_step_tokens, max_step_sequences=wanted.max_step_sequences,
            kv_frame_bytes=wanted.kv_frame_bytes,
        ),
        timeout=10,
    )  # fmt: skip
    weight_node.connect(
        Attached(
            request=1, worker_address=reply.worker_address, lane=reply.lane,
            capacity_blocks=reply.capacity_blocks,
        )
    )  # fmt: skip
    weight_node.plan()
    weight_node.await_credit(lambda credit: credit.granted_blocks == weight_node.want)
    return reply


async def test_the_life_of_a_node(etcd_endpoint, store, keys):
    """READY, attached, filled, drained, emptied, safe to delete, stopped: as seen from outside."""
    async with attention_node(etcd_endpoint, store, keys) as node:
        member = await node.in_state("READY")
        assert member.protocol_version == PROTOCOL_VERSION and member.pid == node.process.pid
        assert await node.health()
        assert (await node.readyz()).text == "ok"
        with Port() as port:
            async with node.stub() as stub:
                w = await enlisted(store, keys, FakeWeightNode(port))
                reply = await attach(stub, w)
                assert (reply.node, reply.epoch, reply.capacity_blocks) == ("a1", member.epoch, 32)
                w.step((0, 0, 10), ops=[w.open(0)])
                w.step((0, 1, 1))
                await eventually(lambda: node.member.kv_used_tokens == 11 and node.member.sequences == 1)
                assert node.member.kv_capacity_tokens == 32 * LAYOUT.block_tokens
                page = await node.metrics()
                assert page["kv_used_tokens"] == 11 and page["lanes"] == page["sequences_held"] == 1
                assert page['kv_blocks{state="used"}'] == blocks_of(11)
                assert page['node_state{state="ready"}'] == page["store_connected"] == 1

                await stub.Drain(pb.DrainRequest(deadline_s=60), timeout=5)
                drained = await node.in_state("DRAINING")
                assert time.time() + 50 < drained.leave_by_s < time.time() + 60
                w.await_credit(lambda credit: credit.draining)
                assert (await node.metrics())['node_state{state="draining"}'] == 1
                assert (await node.readyz()).status_code == 503
                assert not (await stub.Stats(pb.StatsRequest(), timeout=5)).safe_to_delete
                w.step((0, 1, 1))
                w.plan(ops=[w.release(0)])
                await eventually(lambda: node.member.kv_used_tokens == 0)
                assert not await _is_safe(stub), "the weight node has credit, and might append just now"
                w.want, w.returned = 0, w.credit.granted_blocks - blocks_of(12)
                w.plan()
                await eventually(lambda: _is_safe(stub))

                await stub.Undrain(pb.UndrainRequest(), timeout=5)
                assert (await node.in_state("READY")).leave_by_s == 0
                await stub.Detach(pb.DetachRequest(weight_node=w.name, epoch=w.epoch), timeout=5)
                reply = await stub.Stats(pb.StatsRequest(), timeout=5)
                assert not reply.lanes and not reply.safe_to_delete and reply.kv_bytes == KV_BYTES
        began = time.monotonic()
        assert await node.stop() == 0
        assert time.monotonic() - began < 3
        await eventually(lambda: node.member is None, timeout_s=3)
        events = [line["event"] for line in node.log]
        assert [e for e in events if e in ("imported", "registered", "engine_started", "stopping")]
        assert all(line["service"] == "attention" and line["node"] == "a1" for line in node.log)


def blocks_of(tokens: int) -> int:
    return -(-tokens // LAYOUT.block_tokens)


async def _is_safe(stub):
    return (await stub.Stats(pb.StatsRequest(), timeout=5)).safe_to_delete


async def test_an_engine_that_dies_is_replaced_by_an_empty_one_and_none_outlives_its_supervisor(
    etcd_endpoint, store, keys
):
    async with attention_node(etcd_endpoint, store, keys) as node:
        epoch = (await node.in_state("READY")).epoch
        with Port() as port:
            async with node.stub() as stub:
                w = await enlisted(store, keys, FakeWeightNode(port))
                await attach(stub, w)
                w.step((0, 0, 10), ops=[w.open(0)])
                await stub.Drain(pb.DrainRequest(), timeout=5)
                os.kill(node.engine_pid, signal.SIGKILL)
                await node.in_state("PREPARING")
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await attach(stub, await enlisted(store, keys, FakeWeightNode(port)))
                assert error.value.code() is grpc.StatusCode.UNAVAILABLE
                with pytest.raises(LaneDown):
                    w.credits_waiting(5)
                await node.in_state("DRAINING")  # a drain outlives the engine
                reply = await stub.Stats(pb.StatsRequest(), timeout=5)
                assert reply.used_tokens == 0 and not reply.lanes and reply.safe_to_delete
                await stub.Undrain(pb.UndrainRequest(), timeout=5)
                again = FakeWeightNode(port, name=w.name, epoch=w.epoch)
                await attach(stub, again)
                again.step((0, 0, 10), ops=[again.open(0)])
                again.step((0, 1, 1))
        assert node.member.epoch == epoch and node.process.returncode is None
        engine = psutil.Process(node.engine_pid)
        node.process.kill()
        await eventually(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, 5)


@pytest.mark.parametrize(
    "args, said",
    [
        (["--kv-memory", "a lot"], "--kv-memory"),
        (["--cluster", "no/slash"], "cluster"),
        (["--node", ""], "node"),
        (["--etcd", "nonsense"], "etcd endpoint"),
    ],
)
async def test_flags_that_cannot_be_end_it_at_once_with_the_reason(args, said):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "flume_attention", *args, stderr=PIPE, stdout=PIPE
    )
    async with asyncio.timeout(30):
        _, err = await process.communicate()
    last = err.decode().strip().splitlines()[-1]
    assert process.returncode == 1 and last.startswith("Error: ") and said in last
