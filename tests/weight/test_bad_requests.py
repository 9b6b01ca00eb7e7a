"""One bad request ends alone: real engines, a damaged model, and what is beside it goes on as it was."""

from __future__ import annotations

import asyncio

import pytest
from bad_models import INFINITE, NAN, config, damage
from engine_rig import attention_node, weight_node
from faulty_weight_engine import KILLS, RAISES
from flume_common.failures import Failure
from flume_weight import messages as m

pytestmark = pytest.mark.usefixtures("engine_zygote")

GREEDY = {}
SAMPLED = [
    GREEDY,
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.0, "seed": 1, "top_p": 0.9},
    {"temperature": 1.0, "seed": 1, "top_k": 5},
    {"temperature": 1.0, "seed": 1, "min_p": 0.1},
    {"temperature": 1.0, "seed": 1, "top_k": 5, "min_p": 0.1, "top_p": 0.5},
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.5, "temperature": 0.7, "seed": 2},
    {"logit_bias": {7: 5.0}},
    {"logprobs": 3},
    {"min_tokens": 2},
]


@pytest.fixture(scope="module")
def damaged(save_random):
    return damage(save_random(config())[0])


@pytest.fixture(scope="module")
def speechless(save_random):
    return damage(save_random(config())[0], head=True)


class small_rig:
    """One weight engine of a small model, and attention nodes of so many tokens."""

    def __init__(self, model, *capacities, module="flume_weight.engine_process", args=()):
        self._weight = weight_node("weight-1", ["--model", str(model), *args], module)
        self._capacities = capacities
        self._nodes = []

    async def __aenter__(self):
        one = await self._weight.__aenter__()
        for number, capacity in enumerate(self._capacities, 1):
            # Its tokens are smaller than the demo model's, so it has room for more.
            node = attention_node(f"attention-{number}", capacity)
            self._nodes.append(node)
            await one.attach(await node.__aenter__())
        return one

    async def __aexit__(self, *error):
        for node in self._nodes[::-1]:
            await node.__aexit__(*error)
        return await self._weight.__aexit__(*error)


def good(number):
    return [3 + (number * 31 + at * 7) % 60 for at in range(20)]


async def test_a_sequence_without_valid_logits_fails_and_its_neighbours_tokens_do_not_change(damaged):
    flags = ["--tail-margin-tokens", "16", "--mixed-prefill-tokens", "32"]
    async with small_rig(damaged, 512, 512, args=flags) as one:
        names = [f"good-{number}" for number in range(4)]
        settings = [GREEDY, SAMPLED[3], {"logprobs": 2}, {**SAMPLED[7], "top_k": 5}]
        want = [
            await one.generate(f"alone-{number}", good(number), 60, **settings[number]) for number in range(4)
        ]
        for number, name in enumerate(names):
            one.submit(name, good(number), 60, **settings[number])
        await one.tokens_of(names[0], 2)
        for index, sampling in enumerate(SAMPLED):
            one.submit(f"nan-{index}", [NAN, 5, *good(index)], 4, **sampling)
            one.submit(f"inf-{index}", [9, INFINITE, 5], 4, **sampling)
        # In chunks: the later ones meet NaN in what both attention nodes hold of it.
        one.submit("long-0", [5, NAN, *good(1) * 10], 4)
        for index in range(len(SAMPLED)):
            for kind, length in (("nan", 22), ("inf", 3), ("long", 202))[: 3 if index == 0 else 2]:
                end = await one.end_of(f"{kind}-{index}")
                assert isinstance(end, m.Failed) and end.failure is Failure.MODEL_OUTPUT_INVALID, end
                assert end.code == "INTERNAL"
                assert f"NaN logits at token 1 of the answer (position {length})" in end.message
                assert one.tokens(f"{kind}-{index}") == []
        for name, tokens in zip(names, want, strict=True):
            await one.end_of(name)
            assert one.tokens(name) == tokens
        assert await one.is_free()
        await no_routes(one)


@pytest.mark.slow
async def test_one_nan_in_the_head_is_an_error_and_not_an_answer(speechless):
    async with small_rig(speechless, 512) as one:
        for index, sampling in enumerate(SAMPLED):
            one.submit(f"s-{index}", good(index), 4, **sampling)
        for index in range(len(SAMPLED)):
            end = await one.end_of(f"s-{index}")
            assert isinstance(end, m.Failed) and "NaN logits" in end.message, end


async def test_a_step_that_raises_ends_the_sequence_that_does_it_and_no_other(damaged):
    async with small_rig(damaged, 512, 512, module="faulty_weight_engine") as one:
        want = [await one.generate(f"alone-{number}", good(number), 40) for number in range(3)]
        for number in range(3):
            one.submit(f"good-{number}", good(number), 40)
        await one.tokens_of("good-0", 2)
        for number in range(4):
            one.submit(f"bad-{number}", [5, RAISES, *good(number)], 4)
        for number in range(4):
            end = await one.end_of(f"bad-{number}")
            assert isinstance(end, m.Failed) and end.failure is Failure.SEQUENCE_FAILED, end
            assert "RuntimeError: no kernel for this token" in end.message
        for number in range(3):
            assert isinstance(await one.end_of(f"good-{number}"), m.Finished)
            assert one.tokens(f"good-{number}") == want[number]
        assert any(
            isinstance(message, m.Contained) and "Traceback" in message.traceback for message in one.said
        )
        assert await one.is_free()


@pytest.mark.slow
async def test_an_engine_whose_every_step_raises_ends_and_says_of_what(damaged):
    async with small_rig(damaged, 512, module="faulty_weight_engine") as one:
        for number in range(12):
            one.submit(f"bad-{number}", [RAISES], 4)
        words = await one.until(lambda message: isinstance(message, m.EngineFailed))
        assert words.error == "RuntimeError: no kernel for this token" and len(words.sequences) == 1
        assert await asyncio.wait_for(one.weight.process.wait(), 10) != 0


@pytest.mark.slow
async def test_what_was_in_the_last_step_is_known_of_an_engine_that_died_without_a_word(damaged):
    async with small_rig(damaged, 512, module="faulty_weight_engine") as one:
        one.submit("good", good(1), 200)
        await one.tokens_of("good", 3)
        one.submit("bad", [5, KILLS], 4)
        await asyncio.wait_for(one.weight.process.wait(), 20)
        steps = [message.sequences for message in one.said if isinstance(message, m.StepSequences)]
        assert sorted(steps[-1]) == ["bad", "good"]


@pytest.mark.slow
async def test_a_suspect_runs_alone_until_it_has_a_token(damaged):
    async with small_rig(damaged, 512) as one:
        one.submit("good", good(1), 300)
        await one.tokens_of("good", 3)
        sampling = m.SamplingParams(max_tokens=5, ignore_eos=True)
        one.weight.send(m.Submit("suspect", good(2), sampling, suspect=True))
        await one.end_of("suspect")
        steps = [message.sequences for message in one.said if isinstance(message, m.StepSequences)]
        first = next(at for at, names in enumerate(steps) if "suspect" in names)
        assert steps[first] == ["suspect"]
        assert ["good", "suspect"] in [sorted(names) for names in steps[first + 1 :]]


@pytest.mark.slow
async def test_a_sequence_in_whose_steps_one_attention_node_after_another_dies_is_ended(damaged, monkeypatch):
    monkeypatch.setenv("FLUME_FAULT_PREFILL_LAYER_DELAY_MS", "150")
    flags = ["--prefill-tokens", "8", "--mixed-prefill-tokens", "8", "--tail-margin-tokens", "100000"]
    async with small_rig(damaged, *[512] * 6, args=flags) as one:
        one.submit("deadly", good(1) * 20, 4)
        killed = 0
        while not (ends := [each for each in one.said if isinstance(each, m.Failed)]) and killed < 6:
            route = await one.route_of("deadly", lambda ranges: ranges and not lost(one, ranges[-1].node))
            await asyncio.sleep(1)
            node = one.nodes[route[-1].node]
            node.engine.process.kill()
            killed += 1
            await one.until(lambda message, node=node: lost(one, node.name))
            await asyncio.sleep(0.5)
        assert 3 <= killed <= 5, "kills between two steps do not count"
        assert ends[0].failure is Failure.ENGINE_CRASHED
        assert "attention nodes in a row were lost in a step of this request" in ends[0].message
        one.nodes.clear()  # most of them are gone and cannot report


def lost(one, name):
    return any(isinstance(message, m.LaneLost) and message.node == name for message in one.said)


@pytest.mark.slow
async def test_a_message_that_cannot_be_taken_in_ends_its_sequence(damaged):
    async with small_rig(damaged, 512) as one:
        kept = [m.KeptRange("attention-1", 5, -3)]  # nonsense: what the engine makes of it raises
        one.weight.send(m.Submit("odd", good(1), m.SamplingParams(max_tokens=3), [], kept))
        end = await one.end_of("odd")
        assert isinstance(end, m.Failed) and "Submit failed: ValueError" in end.message, end
        assert await one.generate("after", good(1), 3)


async def test_routes_of_sequences_that_wait_again_are_reported_gone(damaged):
    """As happens when KV runs out, or when the only node that held a sequence is lost."""
    async with small_rig(damaged, 8) as one:
        names = [f"s{number}" for number in range(6)]
        for number, name in enumerate(names):
            one.submit(name, good(number), 300)
        gone = await one.until(lambda message: isinstance(message, m.RouteChanged) and not message.ranges)
        assert gone.sequence not in {end.sequence for end in one.said if isinstance(end, m.Finished)}
        for name in names:
            one.weight.send(m.Cancel(name))
        for name in names:
            await one.end_of(name)
        await no_routes(one)


async def no_routes(one):
    await one.until(lambda _: not any(one.routes.values()), 10)
