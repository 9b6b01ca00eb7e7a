"""A real attention engine, with the test as its supervisor."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager

import beside
from fake_weight_node import LAYOUT, FakeWeightNode
from flume_attention.messages import Ask, Attached, FromEngine, Report, Started
from flume_common.engine_link import run_engine
from flume_common.zygote import ENGINE_ZYGOTE

CAPACITY = 32
MODULES = {"cpu": "flume_attention.engine", "cuda": "simulated_gpu_attention"}
ENV = {"OMP_NUM_THREADS": "1", "UCX_TLS": "tcp,sm,self"}


class Node:
    """An attention engine and the supervisor's end of its link."""

    def __init__(self, engine):
        self.engine = engine
        self.seen = []
        self.requests = 100

    async def expect(self, kind, *, timeout_s=10.0, where=lambda message: True):
        async with asyncio.timeout(timeout_s):
            while True:
                message = await self.engine.receive()
                self.seen.append(message)
                if isinstance(message, kind) and where(message):
                    return message

    async def report(self, after: FakeWeightNode | None = None) -> Report:
        """How it is now; `after` this one's last step, whose keys may still be on their way, was stored."""
        if after is not None:
            after.await_credit(lambda credit: credit.committed_step == after.number)
        self.requests += 1
        self.engine.send(Ask(request=self.requests))
        return await self.expect(Report, where=lambda r: r.request == self.requests)

    async def becomes(self, found) -> Report:
        """The first report that `found` likes."""
        async with asyncio.timeout(10.0):
            while True:
                if found(report := await self.report()):
                    return report

    async def attach(self, node: FakeWeightNode, *, want: int = 16, **changes) -> FakeWeightNode:
        """Attach, and wait until all the wanted credit is granted."""
        self.engine.send(node.attach_request(**changes))
        node.connect(await self.expect(Attached))
        node.want = want
        node.plan()
        node.await_credit(lambda credit: credit.granted_blocks == want)
        return node


@asynccontextmanager
async def engine_with(blocks=CAPACITY, layout=LAYOUT, args=(), device="cpu", env=None):
    """On "cuda" the GPU is simulated."""
    args = ["--kv-bytes", str(blocks * layout.block_bytes + 5), "--device", device, *args]
    zygote = os.environ.get(ENGINE_ZYGOTE)
    async with run_engine(
        MODULES[device], args, inbox=FromEngine, env=beside.environment() | ENV | (env or {}), zygote=zygote
    ) as engine:
        node = Node(engine)
        await node.expect(Started, timeout_s=60)
        yield node
