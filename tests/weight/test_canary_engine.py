"""A canary in a real weight engine over real lanes, and sequences that no lane can serve."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest
from engine_rig import prompt, rig, weight_node
from flume_common.failures import Failure
from flume_weight import messages as m
from flume_weight.canary import PROMPT, TOKENS
from flume_weight.sampling import SamplingParams

pytestmark = pytest.mark.usefixtures("engine_zygote")


def send_canary(made, name="canary-1"):
    made.weight.send(m.Submit(name, PROMPT, SamplingParams(max_tokens=TOKENS, ignore_eos=True), canary=True))


def configure(made, wait_s):
    made.weight.send(m.Configure(128, 128, 10.0, unavailable_wait_s=wait_s))


async def steps_on(made):
    """Steps that the attention nodes have answered."""
    return sum([lane.steps for node in made.nodes.values() for lane in (await node.report()).lanes])


async def test_a_canary_asks_an_attention_node_and_leaves_nothing_behind():
    async with rig(4096) as one:
        before = await steps_on(one)
        send_canary(one)
        end = await one.end_of("canary-1")
        assert isinstance(end, m.Finished) and len(one.tokens("canary-1")) == TOKENS
        assert await steps_on(one) - before >= 2
        assert await one.is_free()
        assert "canary-1" not in one.routes, "nothing of it is for etcd"
        counts = {(item.running, item.waiting) for item in one.said if isinstance(item, m.Capacity)}
        assert counts == {(0, 0)}


async def test_a_canary_ends_rather_than_wait_where_memory_is_short_and_nobody_gives_way():
    async with rig(128) as small:
        small.submit("s", prompt(60), 40)
        small.submit("t", prompt(61), 40)
        await small.tokens_of("s", 3)
        began_s = time.monotonic()
        send_canary(small)
        end = await small.end_of("canary-1")
        assert time.monotonic() - began_s < 2
        assert isinstance(end, m.Failed) and end.code == "RESOURCE_EXHAUSTED", end
        for name in "st":
            assert isinstance(await small.end_of(name), m.Finished)
        assert await small.is_free()


async def test_a_canary_beside_other_sequences_changes_none_of_their_tokens():
    async with rig(4096) as one:
        alone = await one.generate("alone", prompt(80), 40)
        one.submit("s", prompt(80), 40)
        for number in range(5):
            send_canary(one, f"canary-{number}")
            await one.end_of(f"canary-{number}")
        await one.end_of("s")
        assert one.tokens("s") == alone


async def test_without_a_lane_a_canary_fails_at_once_and_a_sequence_after_a_short_wait():
    async with weight_node("weight-1") as made:
        configure(made, wait_s=1.0)
        send_canary(made)
        end = await made.end_of("canary-1", timeout_s=1)
        assert (end.code, end.failure) == ("UNAVAILABLE", Failure.NO_LANE)
        made.submit("s", prompt(5))
        began_s = time.monotonic()
        end = await made.end_of("s", timeout_s=5)
        assert (end.code, end.failure) == ("UNAVAILABLE", Failure.NO_LANE) and "no lane" in end.message
        assert 0.9 < time.monotonic() - began_s < 3


async def test_with_a_lane_a_sequence_waits_for_memory_as_long_as_that_takes():
    async with rig(128) as small:
        configure(small, wait_s=0.2)
        small.submit("s", prompt(60), 60)
        small.submit("t", prompt(61), 4)
        await small.tokens_of("s", 30)
        await asyncio.sleep(0.3)
        for name in "st":
            assert isinstance(await small.end_of(name), m.Finished)


async def test_a_sequence_that_lost_all_its_nodes_waits_no_longer_either():
    async with rig(4096) as one:
        configure(one, wait_s=0.5)
        one.submit("s", prompt(60), 2000)
        await one.tokens_of("s", 3)
        os.kill(one.nodes["attention-1"].engine.pid, signal.SIGKILL)
        end = await one.end_of("s", timeout_s=5)
        assert (end.code, end.failure) == ("UNAVAILABLE", Failure.NO_LANE)
