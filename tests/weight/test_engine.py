"""The weight engine and attention engines as real processes over real lanes; supervisors are played."""

from __future__ import annotations

import itertools
import os
import signal
import time

import pytest
from engine_rig import attention_node, prompt, rig, weight_node
from flume_weight import messages as m
from flume_weight.sampling import SamplingParams

pytestmark = pytest.mark.usefixtures("engine_zygote")


async def test_tokens_do_not_depend_on_how_many_nodes_hold_the_ranges():
    async with rig(4096) as one:
        alone = {length: await one.generate(f"s{length}", prompt(length)) for length in (5, 100, 700)}
    async with rig(4096, 4096, 4096, args=["--tail-margin-tokens", "16", "--prefill-tokens", "128"]) as three:
        for length, tokens in alone.items():
            assert await three.generate(f"s{length}", prompt(length)) == tokens
        assert await three.is_free()
        spread = [message for message in three.said if isinstance(message, m.RouteChanged)]
        assert any(len({item.node for item in message.ranges}) == 3 for message in spread)
        names = [f"t{length}" for length in alone]
        for name, length in zip(names, alone, strict=True):
            three.submit(name, prompt(length))
        for name, length in zip(names, alone, strict=True):
            await three.end_of(name)
            assert three.tokens(name) == alone[length]


async def test_cancelling_frees_every_block_within_a_second():
    async with rig(2048, 2048, args=["--tail-margin-tokens", "16"]) as one:
        one.submit("s", prompt(300), max_tokens=1000)
        await one.tokens_of("s", 3)
        assert sum((await one.used_blocks()).values()) > 0
        one.weight.send(m.Cancel("s"))
        assert await one.is_free()
        end = await one.end_of("s")
        assert end.reason == "abort"
        assert one.routes["s"] == []


async def test_a_request_that_could_never_fit_is_refused_with_the_numbers():
    async with rig(256, 128) as small:
        small.submit("big", prompt(300), max_tokens=200)
        end = await small.end_of("big")
        assert (end.code, "500 tokens of KV" in end.message) == ("RESOURCE_EXHAUSTED", True), end.message
        assert "2 attention nodes hold 368" in end.message
        assert await small.generate("fits", prompt(300), max_tokens=4)
        small.submit("long", prompt(5), max_tokens=9000)
        assert "8192" in (await small.end_of("long")).message


async def test_without_a_limit_of_its_own_an_answer_ends_where_memory_does():
    async with rig(64) as small:
        small.submit("s", prompt(40), max_tokens=0)
        end = await small.end_of("s")
        assert (end.reason, end.completion_tokens) == ("length", 24)


async def test_sequences_that_outgrow_memory_take_turns_and_say_the_same_as_alone():
    async with rig(4096) as large:
        alone = [await large.generate(f"s{n}", prompt(60, seed=n), 60) for n in range(4)]
    async with rig(256) as small:  # 480 tokens want to live in 256
        for n in range(4):
            small.submit(f"s{n}", prompt(60, seed=n), 60)
        for n in range(4):
            await small.end_of(f"s{n}")
        assert [small.tokens(f"s{n}") for n in range(4)] == alone
        assert recomputed(small).preempted > 0 and recomputed(small).node_lost == 0
        assert await small.is_free()


async def test_a_killed_attention_node_costs_time_and_no_token():
    async with rig(4096, 4096, args=["--tail-margin-tokens", "32"]) as two:
        expected = await two.generate("s", prompt(200), 60)
        two.submit("t", prompt(200), 60)
        await two.route_of("t", lambda ranges: len({item.node for item in ranges}) == 2)
        dead = two.nodes.pop("attention-2")
        dead.engine.process.kill()
        lost = await two.until(lambda message: isinstance(message, m.LaneLost))
        await two.end_of("t")
        assert two.tokens("t") == expected
        assert recomputed(two) == m.Recomputed(node_lost=lost.lost_tokens)
        assert not lost.replaced, "a new lane is wanted"
        assert await two.is_free()


async def test_a_node_that_comes_back_as_another_process_before_it_is_missed_is_attached_once():
    async with rig(4096) as one, attention_node("attention-1", 4096) as again:
        expected = await one.generate("s", prompt(100), 40)
        one.submit("t", prompt(100), 40)
        await one.tokens_of("t", 5)
        await one.attach(again)
        lost = await one.until(lambda message: isinstance(message, m.LaneLost))
        assert lost.replaced and lost.lost_tokens > 100, "the new lane is there already"
        await one.end_of("t")
        assert one.tokens("t") == expected
        assert await one.is_free()


async def spread(three, names, prompts, max_tokens) -> None:
    """Sequences with their head on node 1, their middle on 2 and their tail on 3; nothing else moves."""
    nodes = list(three.nodes)
    for home in nodes:
        three.weight.send(m.NodeDraining(home, False))
        for other in nodes:
            if other != home:
                three.weight.send(m.NodeDraining(other, True))
        if home == nodes[0]:
            for name, tokens in zip(names, prompts, strict=True):
                three.submit(name, tokens, max_tokens)
        for name in names:
            await three.route_of(name, lambda ranges, home=home: ranges and ranges[-1].node == home)
            await three.tokens_of(name, len(three.tokens(name)) + 4)
    for node in nodes:
        three.weight.send(m.NodeDraining(node, False))


def tokens_on(rig, names, node) -> int:
    """Tokens of closed ranges on a node, by the routes."""
    ranges = [item for name in names for item in rig.routes[name] if item.node == node]
    return sum(item.end - item.start for item in ranges if item.end is not None)


def recomputed(rig) -> m.Recomputed:
    return next((message for message in rig.said[::-1] if isinstance(message, m.Recomputed)), m.Recomputed())


async def lose(rig, *nodes) -> int:
    """Kill these nodes; the tokens that were lost with them, by the engine's word."""
    for node in nodes:
        rig.nodes.pop(node).engine.process.kill()
    lost = [
        await rig.until(lambda message, node=node: isinstance(message, m.LaneLost) and message.node == node)
        for node in nodes
    ]
    return sum(message.lost_tokens for message in lost)


async def recovered(rig, names, since) -> None:
    for name in names:
        await rig.until(
            lambda message, name=name: (
                isinstance(message, m.Recovered)
                and message.sequence == name
                and rig.said.index(message) >= since
            )
        )


async def test_lost_ranges_are_computed_again_and_nothing_else_is():
    args = ["--tail-margin-tokens", "100000", "--mixed-prefill-tokens", "16"]
    names, prompts = ["s1", "s2", "s3"], [prompt(40, 1), prompt(75, 2), prompt(110, 3)]
    async with rig(4096, 4096, 4096, args=args) as some, attention_node("attention-4", 8192) as fourth:
        for name, tokens in zip(["a1", "a2", "a3", "a4"], [*prompts, prompt(30, 4)], strict=True):
            some.submit(name, tokens, 90)
        for name in ["a1", "a2", "a3", "a4"]:
            await some.end_of(name)
        *expected, undisturbed = map(some.tokens, ["a1", "a2", "a3", "a4"])
        await spread(some, names, prompts, 90)
        await some.attach(fourth)
        for probe in map("probe-{}".format, itertools.count()):  # until it is known how much room it has
            await some.generate(probe, prompt(5), 1)
            if (await some.route_of(probe, bool))[0].node == "attention-4":
                break
        some.submit("bystander", prompt(30, 4), 90)
        await some.tokens_of("bystander", 4)
        assert [item.node for item in some.routes["bystander"]] == ["attention-4"]

        middle, since = tokens_on(some, names, "attention-2"), len(some.said)
        assert await lose(some, "attention-2") == middle > 0
        await recovered(some, names, since)
        for name in names:  # a route is reported with the next turn
            await some.route_of(name, lambda ranges: any(item.node == "attention-4" for item in ranges))
        assert recomputed(some) == m.Recomputed(node_lost=middle)
        assert tokens_on(some, names, "attention-4") == middle

        head, since = tokens_on(some, names, "attention-1"), len(some.said)
        lost = await lose(some, "attention-1", "attention-3")
        assert lost > head >= sum(map(len, prompts))
        during = len(some.said)
        await recovered(some, names, since)
        meanwhile = [x for x in some.said[during:] if isinstance(x, m.Produced)]
        assert recomputed(some) == m.Recomputed(node_lost=middle + lost)
        for name, tokens in zip(names, expected, strict=True):
            await some.end_of(name)
            assert some.tokens(name) == tokens
        await some.end_of("bystander")
        assert some.tokens("bystander") == undisturbed
        assert any(token.sequence == "bystander" for x in meanwhile for token in x.tokens)
        assert recomputed(some) == m.Recomputed(node_lost=middle + lost)
        assert await some.is_free()


async def test_another_weight_node_goes_on_where_a_killed_one_stopped():
    args = ["--tail-margin-tokens", "32"]
    cases = {"s": {}, "t": {"temperature": 1.0, "seed": 5}, "u": {}, "v": {}}
    prompts = {name: prompt(length, length) for name, length in zip(cases, (200, 30, 90, 60), strict=True)}
    async with rig(4096, 4096, args=args) as first, weight_node("weight-2", args) as second:
        for name, sampling in cases.items():
            first.submit(f"{name}-alone", prompts[name], 60, **sampling)
        for name in cases:
            await first.end_of(f"{name}-alone")
        expected = {name: first.tokens(f"{name}-alone") for name in cases}
        for node in first.nodes.values():
            await second.attach(node)
        for name, sampling in cases.items():
            first.submit(name, prompts[name], 60, **sampling)
        for name in cases:
            await first.tokens_of(name, 20)
        await first.route_of("s", lambda ranges: len({item.node for item in ranges}) == 2)
        first.weight.process.kill()
        await first.weight.process.wait()
        said = {name: first.tokens(name) for name in cases}

        said["u"] = said["u"][:-5]  # what the client got is older than what is stored
        for name in ("s", "t", "u"):
            kept = await second.kept(name)
            second.submit(name, prompts[name], 60, said[name], kept, **cases[name])
            await second.end_of(name)
            assert said[name] + second.tokens(name) == expected[name]
        assert recomputed(second).weight_node_lost <= 3, "one step: a token of each"
        adopted = {x.sequence: x.tokens for x in second.said if isinstance(x, m.Adopted)}
        assert adopted["s"] >= len(prompts["s"]) + len(said["s"]) - 2
        assert adopted["u"] == len(prompts["u"]) + len(said["u"]) - 1

        # An attention node dies, too: what the other one keeps is used all the same.
        kept = await second.kept("v")
        lost = next(iter({item.node for item in kept}))
        await lose(second, lost)
        again = recomputed(second).weight_node_lost
        second.submit("v", prompts["v"], 60, said["v"], kept)
        await second.end_of("v")
        assert said["v"] + second.tokens("v") == expected["v"]
        missing = sum(item.tokens for item in kept if item.node == lost)
        assert missing - 1 <= recomputed(second).weight_node_lost - again <= missing + 1
        assert await second.is_free()


async def test_a_draining_node_gets_no_new_tokens_and_keeps_what_it_holds():
    async with rig(4096, 4096) as two:
        expected = await two.generate("s", prompt(100), 80)
        two.submit("t", prompt(100), 80)
        await two.tokens_of("t", 3)
        (first,) = two.routes["t"]
        two.weight.send(m.NodeDraining(first.node, True))
        closed, tail = await two.route_of("t", lambda ranges: len(ranges) == 2)
        held = (await two.nodes[first.node].report()).used_tokens
        assert closed.node == first.node and closed.end == tail.start == held
        assert tail.node != first.node
        await two.end_of("t")
        assert two.tokens("t") == expected


async def test_sampled_tokens_depend_on_the_seed_and_not_on_the_company():
    async with rig(4096) as one:
        wild = {"temperature": 1.0, "seed": 7}
        alone = await one.generate("s", prompt(30), 24, **wild)
        for n in range(5):
            one.submit(f"other{n}", prompt(20 + n, seed=n), 40, temperature=0.9)
        assert await one.generate("t", prompt(30), 24, **wild) == alone
        assert await one.generate("u", prompt(30), 24, temperature=1.0, seed=8) != alone


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 1.0, "seed": 7, "presence_penalty": 1.0, "logprobs": 0}],
    ids=["greedy", "sampled"],
)
async def test_an_answer_begun_elsewhere_goes_on_with_the_same_tokens(sampling):
    async with rig(1024) as one:
        whole = await one.generate("whole", prompt(30), 24, **sampling)
        for said in (1, 10, 23, 24):
            rest = await one.generate(f"after{said}", prompt(30), 24, said=whole[:said], **sampling)
            assert rest == whole[said:]
            end = await one.end_of(f"after{said}")
            assert (end.reason, end.prompt_tokens, end.completion_tokens) == ("length", 30, 24)


async def test_a_wrong_request_is_refused_by_name_and_leaves_nothing():
    async with rig(1024) as one:
        for name, message in {
            "empty": m.Submit("empty", [], SamplingParams()),
            "vocabulary": m.Submit("vocabulary", [49152], SamplingParams()),
            "said": m.Submit("said", [5], SamplingParams(), [49152]),
            "bias": m.Submit("bias", [5], SamplingParams(logit_bias={50000: 1.0})),
        }.items():
            one.weight.send(message)
            assert (await one.end_of(name)).code == "INVALID_ARGUMENT"
        assert await one.is_free()


async def test_who_does_not_need_a_silent_node_keeps_its_pace_and_who_does_waits_for_it():
    async with rig(4096, 4096, args=["--tail-margin-tokens", "100000"]) as two:
        alone = {name: await two.generate(name, prompt(90, seed), 90) for seed, name in enumerate("xy")}
        two.submit("a", prompt(90, 0), 90)
        await two.tokens_of("a", 2)
        two.submit("b", prompt(90, 1), 90)
        homes = [(await two.route_of(name, bool))[0].node for name in "ab"]
        assert homes[0] != homes[1]
        await two.tokens_of("b", 5)
        silent = two.nodes[homes[1]].engine.process
        os.kill(silent.pid, signal.SIGSTOP)
        try:
            said = await two.until(lambda message: isinstance(message, m.NodeSilent), 5)
            assert (said.node, said.sequences) == (homes[1], 1)
            had = len(two.tokens("b"))
            await two.tokens_of("a", len(two.tokens("a")) + 20)
            two.submit("c", prompt(20), 5)
            await two.end_of("c")
            assert len(two.tokens("b")) <= had + 1
        finally:
            os.kill(silent.pid, signal.SIGCONT)
        for name in "ab":
            await two.end_of(name)
        assert [two.tokens(name) for name in "ab"] == list(alone.values())
        assert not any(isinstance(message, m.LaneLost | m.Recomputed) for message in two.said)


async def test_a_node_that_stays_silent_is_lost_when_its_time_is_over():
    args = ["--tail-margin-tokens", "100000", "--step-timeout-s", "3"]
    async with rig(4096, 4096, args=args) as two:
        alone = await two.generate("x", prompt(90), 40)
        two.submit("a", prompt(90, 1), 400)
        home = (await two.route_of("a", bool))[0].node
        await two.tokens_of("a", 2)
        two.submit("b", prompt(90), 40)
        (tail,) = await two.route_of("b", bool)
        assert tail.node != home
        await two.tokens_of("b", 3)
        os.kill(two.nodes[tail.node].engine.process.pid, signal.SIGSTOP)
        stopped_s = time.monotonic()
        two.nodes.pop(tail.node)
        lost = await two.until(lambda message: isinstance(message, m.LaneLost), 20)
        assert (lost.node, lost.reason) == (tail.node, "no answer within 3 s")
        assert 2.5 < time.monotonic() - stopped_s < 9
        await two.end_of("b")
        assert two.tokens("b") == alone
        two.weight.send(m.Cancel("a"))


async def test_an_epoch_on_a_lane_is_no_claim():
    """Only the attention node's supervisor, which asks etcd, raises a lane's epoch."""
    async with rig(1024) as one:
        node = one.nodes["attention-1"]
        before = (await node.report()).lanes[0].epoch
        one.weight.send(m.Epoch(before + 8))
        await one.generate("s", prompt(20), 5)
        assert (await node.report()).lanes[0].epoch == before
