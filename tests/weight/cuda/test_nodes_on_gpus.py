"""Weight and attention engines on simulated GPUs, as processes over real lanes.

On a real GPU `bench/gpu_check.sh RESULTS nodes` does the same with nodes as they are started by people.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import msgspec
import pytest
import torch
from engine_rig import attention_node, weight_node
from flume_common.engine_link import run_engine
from flume_common.gpu import nvml
from flume_common.lanes import Port
from flume_common.zygote import ENGINE_ZYGOTE
from flume_weight import messages as m
from flume_weight.batch import Batch
from flume_weight.config import check, supervisor_flags
from flume_weight.cuda.backend import GpuBackend
from flume_weight.cuda.buckets import Buckets
from flume_weight.cuda.eager import EagerForward
from flume_weight.cuda.forward import CapturedForward
from flume_weight.errors import ConfigRefused
from flume_weight.model import LocalAttention
from flume_weight.scheduler import StepLimits
from simulated_device import SimulatedDevice
from simulated_gpu_weight import CONFIG, model
from step_fakes import ReferenceOps

pytestmark = pytest.mark.usefixtures("engine_zygote")
TOKEN_BYTES = CONFIG.layout("float32").token_bytes
on_each_hop = pytest.mark.parametrize("hop", ["direct", "frames"])
FLAGS = ["--device", "cuda", "--max-sequences", "4", "--prefill-tokens", "24", "--mixed-prefill-tokens", "8"]


def prompt(length, seed=1):
    return [(seed * 31 + number * 17) % CONFIG.vocab_size for number in range(length)]


def own_tokens(ids, count):
    """What the model says after these, the likeliest token each time."""
    torch.set_num_threads(1)
    transformer, attention = model(), LocalAttention(CONFIG.num_layers)
    said, at, new = [], 0, list(ids)
    while len(said) < count:
        attention.next_pass([("s", len(new))])
        positions = torch.arange(at, at + len(new))
        logits = transformer.forward(torch.tensor(new), positions, attention, torch.tensor([len(new) - 1]))
        at, new = at + len(new), [int(logits.argmax())]
        said += new
    return said


@asynccontextmanager
async def gpu_nodes(*capacities, **options):
    """One weight engine with an attention node for each capacity in tokens, all on simulated GPUs."""
    async with AsyncExitStack() as stack:
        rig = await stack.enter_async_context(gpu_weight_node("weight-1", **options))
        for number, capacity in enumerate(capacities, 1):
            node = attention_node(f"attention-{number}", capacity, TOKEN_BYTES)
            await rig.attach(await stack.enter_async_context(node))
        yield rig


def hops(rig):
    return {message.hop for message in rig.said if isinstance(message, m.LaneUp)}


def gpu_weight_node(
    name, step_timeout_s=20, margin=16, hop="direct", microbatches="auto", module="simulated_gpu_weight"
):
    flags = [
        *FLAGS, "--tail-margin-tokens", str(margin), "--step-timeout-s", str(step_timeout_s),
        "--microbatches", microbatches, "--hop", "auto" if hop == "direct" else hop,
    ]  # fmt: skip
    return weight_node(name, flags, module, os.environ[ENGINE_ZYGOTE])


@pytest.mark.parametrize("direct", [False, True], ids=["frames", "either way"])
def test_decode_batches_are_captured_steps_all_of_them_captured_beforehand_and_others_are_not(direct):
    device, layout, limits = SimulatedDevice(), CONFIG.layout("float32"), StepLimits(8, 64, 16)
    backend = GpuBackend(device, ReferenceOps(), direct)
    with Port() as port, backend.passes(model(), port, layout, limits, 1.0) as passes:
        both = len(Buckets.up_to(8).rows) + 3
        assert device.captures == both + direct * len(Buckets.up_to(8).rows), "2, 4 and 8 rows in two, too"
        ids = torch.zeros(8, dtype=torch.int64)
        decoding = Batch([], ids, ids, ids, [], [])
        assert isinstance(passes.of(decoding), CapturedForward)
        assert isinstance(passes.of(replace(decoding, chunks=[slice(0, 2)])), EagerForward)
        more = torch.zeros(9, dtype=torch.int64)
        assert isinstance(passes.of(replace(decoding, token_ids=more)), EagerForward)


@on_each_hop
async def test_tokens_are_the_models_own_wherever_the_ranges_lie(hop):
    lengths = (5, 40, 90)
    async with gpu_nodes(512, 512, hop=hop) as rig:
        for length in lengths:
            rig.submit(f"s{length}", prompt(length, seed=length), 24)
        for length in lengths:
            assert (await rig.end_of(f"s{length}")).reason == "length"
            assert rig.tokens(f"s{length}") == own_tokens(prompt(length, seed=length), 24)
        routes = [message for message in rig.said if isinstance(message, m.RouteChanged)]
        assert any(len({item.node for item in route.ranges}) == 2 for route in routes)
        assert await rig.is_free()
        assert hops(rig) == {hop}


async def test_tokens_are_the_models_own_in_two_microbatches_which_a_setting_begins_while_they_run():
    async with asyncio.timeout(60), gpu_nodes(512, 512, hop="frames", microbatches="2") as rig:
        settings = m.Configure(
            tail_margin_tokens=16, mixed_prefill_tokens=8, step_timeout_s=20.0, microbatches="1"
        )
        rig.weight.send(settings)
        rig.submit("e", prompt(20), 8)
        assert await rig.generate("f", prompt(20), 8) == own_tokens(prompt(20), 8)
        assert not any(isinstance(said, m.StepModel) and said.microbatches == 2 for said in rig.said)
        rig.weight.send(msgspec.structs.replace(settings, microbatches="2"))
        want = [own_tokens(prompt(20 + 5 * seed, seed), 20) for seed in range(3)]
        for number in itertools.count():  # how the last step ran is said once a second, whichever that is
            names = [f"{name}{number}" for name in "abc"]
            for seed, name in enumerate(names):
                rig.submit(name, prompt(20 + 5 * seed, seed), 20)
            for seed, name in enumerate(names):
                assert (await rig.end_of(name)).reason == "length"
                assert rig.tokens(name) == want[seed]
            if any(isinstance(said, m.StepModel) and said.microbatches == 2 for said in rig.said):
                break


def test_two_microbatches_on_a_cpu_are_refused_by_name():
    args = supervisor_flags().parse_args(["--model", "x", "--microbatches", "2"])
    with pytest.raises(ConfigRefused, match="--microbatches 2 needs --device cuda"):
        check(args)


@on_each_hop
async def test_a_killed_attention_node_costs_time_and_no_token(hop):
    async with gpu_nodes(512, 512, hop=hop) as rig:
        rig.submit("s", prompt(60), 60)
        await rig.route_of("s", lambda ranges: len({item.node for item in ranges}) == 2)
        rig.nodes.pop("attention-1").engine.process.kill()
        assert (await rig.end_of("s")).reason == "length"
        assert rig.tokens("s") == own_tokens(prompt(60), 60)
        assert any(isinstance(message, m.LaneLost) for message in rig.said)


async def test_a_step_whose_node_is_silent_is_released_and_the_sequence_goes_on_elsewhere():
    async with gpu_nodes(512, 512, step_timeout_s=1) as rig:
        rig.submit("s", prompt(60), 60)
        await rig.route_of("s", lambda ranges: len({item.node for item in ranges}) == 2)
        silent = rig.nodes.pop("attention-1").engine
        os.kill(silent.pid, signal.SIGSTOP)
        assert (await rig.end_of("s")).reason == "length"
        assert rig.tokens("s") == own_tokens(prompt(60), 60)
        lost = next(message for message in rig.said if isinstance(message, m.LaneLost))
        assert "no answer within 1 s" in lost.reason
        silent.process.kill()


async def test_a_node_that_takes_no_plan_is_lost_when_its_time_is_over_though_no_step_waits_for_it():
    async with gpu_nodes(512, step_timeout_s=1) as rig:
        node = rig.nodes["attention-1"]
        assert await rig.generate("before", prompt(20), 4) == own_tokens(prompt(20), 4)
        os.kill(node.engine.pid, signal.SIGSTOP)
        try:
            rig.submit("s", prompt(30), 8)  # it has no credit left: the node is asked for some
            async with asyncio.timeout(15):
                lost = await rig.until(lambda message: isinstance(message, m.LaneLost))
            assert (lost.node, lost.reason) == ("attention-1", "no answer within 1 s")
        finally:
            os.kill(node.engine.pid, signal.SIGCONT)
        await rig.attach(node)
        assert (await rig.end_of("s")).reason == "length"
        assert rig.tokens("s") == own_tokens(prompt(30), 8)


async def test_tokens_are_the_models_own_where_one_node_is_reached_directly_and_the_other_is_not(monkeypatch):
    async with gpu_nodes(512) as rig:
        monkeypatch.setenv("SIMULATED_CARD", "GPU-elsewhere")
        async with attention_node("attention-2", 512, TOKEN_BYTES) as second:
            await rig.attach(second)
            rig.submit("s", prompt(60), 24)
            assert (await rig.end_of("s")).reason == "length"
            assert rig.tokens("s") == own_tokens(prompt(60), 24)
            ups = {message.node: message for message in rig.said if isinstance(message, m.LaneUp)}
            assert (ups["attention-1"].hop, ups["attention-2"].hop) == ("direct", "frames")
            assert ups["attention-2"].reason == "the card GPU-elsewhere is not visible to this process"


@on_each_hop
async def test_who_does_not_need_a_silent_node_goes_on_and_who_does_waits_for_it(hop):
    async with gpu_nodes(512, 512, margin=10_000, hop=hop) as rig:
        for seed, name in enumerate("ab"):
            rig.submit(name, prompt(30, seed), 80)
            await rig.tokens_of(name, 2)
        homes = [(await rig.route_of(name, bool))[0].node for name in "ab"]
        assert homes[0] != homes[1]
        silent = rig.nodes[homes[1]].engine
        os.kill(silent.pid, signal.SIGSTOP)
        try:
            said = await rig.until(lambda message: isinstance(message, m.NodeSilent), 10)
            assert (said.node, said.sequences) == (homes[1], 1)
            had = len(rig.tokens("b"))
            await rig.tokens_of("a", len(rig.tokens("a")) + 20)
            assert len(rig.tokens("b")) <= had + 1
        finally:
            os.kill(silent.pid, signal.SIGCONT)
        for seed, name in enumerate("ab"):
            assert (await rig.end_of(name)).reason == "length"
            assert rig.tokens(name) == own_tokens(prompt(30, seed), 80)
        assert not any(isinstance(message, m.LaneLost) for message in rig.said)


async def test_another_weight_node_goes_on_where_a_killed_one_stopped():
    async with gpu_nodes(512, 512) as one, gpu_weight_node("weight-2") as two:
        for node in one.nodes.values():
            await two.attach(node)
        one.submit("s", prompt(60), 200)
        await one.tokens_of("s", 10)
        one.weight.process.kill()
        await one.weight.process.wait()
        said = one.tokens("s")
        two.submit("s", prompt(60), len(said) + 20, said, await two.kept("s"))
        assert (await two.end_of("s")).reason == "length"
        assert said + two.tokens("s") == own_tokens(prompt(60), len(said) + 20)
        adopted = next(message for message in two.said if isinstance(message, m.Adopted))
        assert adopted.tokens >= 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
async def test_without_a_gpu_an_engine_says_so_and_ends():
    flags = ["--node", "weight-1", "--model", "/none", "--device", "cuda"]
    engine = run_engine(
        "flume_weight.engine_process", flags, inbox=m.Outbound, zygote=os.environ[ENGINE_ZYGOTE]
    )
    async with engine as weight:
        refused = await weight.receive()
        assert isinstance(refused, m.Refused) and refused.message.startswith("--device cuda: ")
        assert await weight.process.wait() == 1


def test_without_a_driver_a_node_is_refused_before_it_starts_anything(monkeypatch):
    def none():
        raise nvml.NvmlUnavailable("no NVIDIA driver")

    monkeypatch.setattr(nvml, "look", none)
    with pytest.raises(ConfigRefused, match=r"--device cuda: no GPU can be used: no NVIDIA driver; use"):
        check(supervisor_flags().parse_args(["--model", "x", "--device", "cuda"]))


async def test_sampled_tokens_do_not_depend_on_the_company():
    async with gpu_nodes(512) as rig:
        alone = await rig.generate("a", prompt(20), 16, temperature=1.0, seed=7)
        rig.submit("b", prompt(20), 16, temperature=1.0, seed=7)
        rig.submit("c", prompt(33), 16)
        await rig.end_of("b")
        await rig.end_of("c")
        assert rig.tokens("b") == alone and rig.tokens("c") == own_tokens(prompt(33), 16)


def prompts_apart(count, tokens):
    """Prompts, a token that the first one's answer comes to, and that none of the others has or says."""
    for seed in itertools.count(1):
        prompts = [prompt(6 + at, seed * 5 + at) for at in range(count)]
        answers = [own_tokens(ids, tokens) for ids in prompts]
        others = {token for ids in (*prompts, *answers[1:]) for token in ids}
        for at in range(2, 6):
            if answers[0][at] not in others and answers[0].index(answers[0][at]) == at:
                return prompts, answers, at
    raise AssertionError("there is no such seed")


@on_each_hop
@pytest.mark.parametrize("sampling", [{}, {"logprobs": 2}], ids=["greedy", "logprobs"])
async def test_a_sequence_that_comes_to_nan_in_captured_steps_ends_alone(hop, sampling, monkeypatch):
    prompts, answers, at = prompts_apart(3, 12)
    monkeypatch.setenv("DAMAGED_TOKEN", str(answers[0][at]))
    async with gpu_nodes(512, 512, hop=hop, module="damaged_gpu_weight") as rig:
        for number, ids in enumerate(prompts):
            rig.submit(f"s{number}", ids, 12, **sampling)
        end = await rig.end_of("s0")
        assert isinstance(end, m.Failed) and "NaN logits" in end.message, end
        assert f"token {at + 2} of the answer" in end.message
        assert rig.tokens("s0") == answers[0][: at + 1]
        for number in (1, 2):
            assert isinstance(await rig.end_of(f"s{number}"), m.Finished)
            assert rig.tokens(f"s{number}") == answers[number]
        assert await rig.is_free()
