"""The decode step of a model of random weights: one process against a weight node and an attention node.

    python bench/gpu_step.py --model 8b --batch 8 --context 8192 32768 [--microbatches 2] [--out step.json]

Both run the same kernels from captured graphs. `one` attends in the weight node's own graph; `split` is the
real data path: queries over a lane to another process, partials back, keys appended there. `direct` is the
same with queries and partials in device memory that both have mapped. Milliseconds a step, median of --steps;
`attention` is what the driver saw between queries' flags and their gates, which says nothing of direct steps.
With --microbatches 2 `halves` is the split step in two of them, beside what the step model makes of it. On
one card the two processes need MPS. `--model tiny` runs on anything that has a GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from flume_attention.blocks import BlockPool
from flume_attention.cuda.answers import Answers
from flume_attention.cuda.device_pool import DevicePool
from flume_attention.cuda.direct_answers import DirectAnswers
from flume_attention.cuda.region_offer import offer_region
from flume_attention.cuda.session import RINGS, GpuLaneSession, lane_buffers
from flume_attention.frame_tensors import FrameTensors
from flume_attention.messages import Attach
from flume_attention.node import Node
from flume_common.lanes import Lane, Port, Side
from flume_common.layout import KvLayout
from flume_common.wire import LaneShape
from flume_kernels.gpu.watchdog import Watchdog
from flume_weight.cuda.buckets import StepSize
from flume_weight.cuda.captured_steps import CapturedSteps
from flume_weight.cuda.chooser import predicted_s
from flume_weight.cuda.decode_step import DecodeStep
from flume_weight.cuda.direct_exchange import DirectExchange
from flume_weight.cuda.driver import StepDriver, StepTimes
from flume_weight.cuda.lane_exchange import LaneExchange
from flume_weight.cuda.ops import Angles, Ops
from flume_weight.cuda.region_mapping import mapped
from flume_weight.cuda.step_buffers import StepBuffers
from flume_weight.model.config import ModelConfig
from flume_weight.model.weights import Weights, allocate, slots
from flume_weight.peer import Peer
from flume_weight.range_attention import Exchange, RangeAttention

TIMEOUT_S = 60.0
Step = Callable[[], float]
"""Runs one step; returns the seconds that its attention took, as far as they are known."""


def model(name: str, layers: int, context: int) -> ModelConfig:
    """Shapes only. 70b-tp8 is the share of one of eight cards."""
    hidden, inner, vocabulary, heads, kv_heads, dim, depth = {
        "8b": (4096, 14336, 128256, 32, 8, 128, 32),
        "70b-tp8": (8192, 3584, 128256, 8, 1, 128, 80),
        "tiny": (64, 96, 128, 4, 2, 64, 2),
    }[name]
    return ModelConfig(
        architecture="llama", vocab_size=vocabulary, context_tokens=context + 1024, eos_token_ids=(0,),
        hidden_size=hidden, intermediate_size=inner, num_layers=layers or depth, num_query_heads=heads,
        num_kv_heads=kv_heads, head_dim=dim, rms_norm_eps=1e-5, rope_theta=5e5,
    )  # fmt: skip


@dataclass(frozen=True)
class Problem:
    config: ModelConfig
    dtype: torch.dtype
    batch: int
    context: int
    steps: int = 30
    warm_up: int = 5
    microbatches: int = 1  # the most
    layers_per_memory: int = 1  # of an attention node: more where not all keys and values fit the card

    @property
    def layout(self) -> KvLayout:
        return self.config.layout(str(self.dtype).removeprefix("torch."))

    @property
    def blocks(self) -> int:
        """Every sequence's context and what the steps append."""
        return self.batch * self.layout.blocks_of(self.longest)

    @property
    def longest(self) -> int:
        """Tokens of a sequence at last: each way of splitting the step adds to it."""
        return self.context + (self.microbatches + 1) * (self.steps + self.warm_up) + 1

    @property
    def shape(self) -> LaneShape:
        message = max(self.batch * self.layout.layer_token_bytes, 1 << 20)
        return LaneShape(self.layout, max(self.batch, 16), max(self.batch, 16), kv_frame_bytes=message)


def random_weights(problem: Problem, where: torch.device) -> Weights:
    with torch.device(where):
        weights = allocate(problem.config, problem.dtype)
    for place in slots(weights).values():
        place.normal_(0.0, 0.02)
    return weights


def median_ms(problem: Problem, step: Step) -> dict[str, float]:
    totals, attention = [], []
    for _ in range(problem.warm_up + problem.steps):
        start = time.perf_counter()
        attention.append(1e3 * step())
        totals.append(1e3 * (time.perf_counter() - start))
    measured = totals[problem.warm_up :]
    return {
        "step": statistics.median(measured),
        "worst": max(measured),
        "attention": statistics.median(attention[problem.warm_up :]),
    }


# One process


class AttendsItself:
    """A device whose waits are the attention itself, over keys it holds: all of a step in one graph."""

    def __init__(self, device: Any, problem: Problem, attention_ops: Any) -> None:
        self._device = device
        self._ops = attention_ops
        self._problem = problem
        self._pool = DevicePool(device, attention_ops, problem.layout, problem.blocks)
        for layer in self._pool.layers:
            layer.kv.normal_()
        per_row = problem.layout.blocks_of(problem.context)
        order = torch.randperm(problem.batch * per_row, dtype=torch.int32)
        self._tables = order.view(problem.batch, per_row).to(self._pool.where)
        self._lengths = torch.full(
            (problem.batch,), problem.context, dtype=torch.int32, device=self._pool.where
        )
        self._plan = attention_ops.plan(problem.batch, problem.batch, problem.context)
        self.buffers: StepBuffers | None = None
        self._layer = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def host_tensor(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        make = self._device.tensor if dtype.is_floating_point else self._device.host_tensor
        found: torch.Tensor = make(*size, dtype=dtype)
        return found

    def signal(self, flags: Any, number: int) -> None: ...

    def await_(self, flags: Any, number: int) -> None:
        assert self.buffers is not None
        (part,) = self.buffers.microbatches
        if self._layer == 0:
            self._ops.update(self._plan, self._lengths)
        pool = self._pool.layers[self._layer]
        self._ops.attend(self._plan, part.queries, pool, self._tables, part.part_o[0], part.part_lse[0])
        self._layer = (self._layer + 1) % len(self._pool.layers)


def one_process(problem: Problem, device: Any, ops: Ops, attention_ops: Any) -> dict[str, float]:
    alone = AttendsItself(device, problem, attention_ops)
    where = alone._pool.where
    weights = random_weights(problem, where)
    buffers = StepBuffers.allocate(alone, problem.config, StepSize(problem.batch), 1, problem.dtype)
    alone.buffers = buffers
    step = DecodeStep(alone, ops, problem.config, weights, Angles.of(problem.config, where), buffers)
    device.warm_up(step)
    graph = device.capture(step)
    ids = torch.zeros(problem.batch, dtype=torch.int64)
    positions = torch.full_like(ids, problem.context)

    def run() -> float:
        buffers.token_ids[:], buffers.positions[:] = ids, positions
        graph.launch()
        while not graph.done():
            pass
        return 0.0

    return median_ms(problem, run)


# Two processes


class Bookkeeping(Node):
    """A node without memory of its own: that is on the GPU."""

    def _take_layout(self, layout: KvLayout) -> None:
        self.blocks = BlockPool(self.kv_bytes // layout.block_bytes)


def attention_node(problem: Problem, device: Any, ops: Any, pipe: Connection, lane: int = 1) -> None:
    """Serves one lane until the pipe says something. The lane's numbers are `lane` and the next."""
    with torch.inference_mode(), Port() as port, Watchdog() as watchdog:
        pipe.send(port.address)
        session = _session(problem, device, ops, port, watchdog, pipe.recv(), lane)
        foreseen = _captures(session)
        pipe.send(session.region)
        while not session.holdings.slots:
            port.progress()
            session.advance()
        _fill(session, problem.context)
        session.credit_due = True
        pipe.send("filled")
        rounds = 0
        while rounds % 4096 or not pipe.poll():
            rounds += 1
            port.progress()
            session.advance()
        session.close()
        pipe.send(_captures(session) - foreseen)


def _captures(session: GpuLaneSession) -> int:
    direct: DirectAnswers | None = session._direct
    return session._answers.steps.captures + (direct.steps.captures if direct is not None else 0)


def _session(
    problem: Problem, device: Any, ops: Any, port: Port, watchdog: Watchdog, address: bytes, number: int
) -> GpuLaneSession:
    shape = problem.shape
    node = Bookkeeping(problem.blocks * problem.layout.block_bytes)
    request = Attach(
        request=1, weight_node="weight-1", epoch=1, layout=problem.layout, worker_address=address,
        lane=number, max_step_tokens=shape.max_step_tokens, max_step_sequences=shape.max_step_sequences,
        kv_frame_bytes=shape.kv_frame_bytes,
    )  # fmt: skip
    holdings = node.add("weight-1", node.admit(request))
    lane: Lane[LaneShape] = port.connect(
        "weight-1", address, shape, Side.ATTENTION, send_lane=number, receive_lane=number + 1,
        allocate=lambda size: device.host_tensor(size, dtype=torch.uint8).numpy(), rings=RINGS,
    )  # fmt: skip
    pool = node.pool = _pool(problem, device, ops)
    buffers = lane_buffers(FrameTensors(problem.layout), lane, shape.max_step_tokens)
    answers = Answers(
        device, ops, pool, buffers,
        max_rows=shape.max_step_sequences, max_length=problem.longest, watchdog=watchdog,
    )  # fmt: skip
    offer = offer_region(device, ops, pool, shape.max_step_sequences, problem.longest, watchdog)
    session = GpuLaneSession(node, "weight-1", 1, lane, holdings, answers=answers, direct=offer.answers)
    session.region = offer.handle
    if offer.why_not:
        print(f"no direct steps: {offer.why_not}", file=sys.stderr, flush=True)
    return session


def _pool(problem: Problem, device: Any, ops: Any) -> DevicePool:
    """Random keys and values. Layers that share memory are far apart: none finds the other's in a cache."""
    layout = problem.layout
    own = layout.num_layers // problem.layers_per_memory
    pool = DevicePool(device, ops, replace(layout, num_layers=own), problem.blocks)
    for layer in pool.layers:
        layer.kv.normal_()
    pool.layout, pool.layers = layout, pool.layers * problem.layers_per_memory
    return pool


def _fill(session: GpuLaneSession, tokens: int) -> None:
    """As if every slot's open range had been appended so many tokens, and credit for all the rest."""
    holdings = session.holdings
    for slot in holdings.slots.values():
        (item,) = slot.ranges
        item.reserve(tokens)
        item.commit(tokens)
        slot.held += tokens
        holdings.held_tokens += tokens
        holdings.held_blocks += item.num_blocks
        holdings.taken += item.num_blocks
    holdings.granted = holdings.blocks.num_blocks


def weight_node(
    problem: Problem, device: Any, ops: Ops, where: torch.device, pipe: Connection
) -> dict[str, dict[str, float]]:
    """Decodes against the attention node at the other end of the pipe: in whole steps, in microbatches, and
    direct."""
    weights = random_weights(problem, where)
    steps = CapturedSteps(device, ops, problem.config, weights, parts=1)
    with torch.inference_mode(), Port() as port, Watchdog() as watchdog:
        pipe.send(port.address)
        address, region = pipe.recv(), pipe.recv()
        lane = port.connect("attention-1", address, problem.shape, Side.WEIGHT, send_lane=2, receive_lane=1)
        peer = Peer("attention-1", lane, problem.blocks)
        for slot in range(problem.batch):
            peer.open(slot, 0, slot)
        eager = RangeAttention(port, problem.layout, problem.layout.head_dim**-0.5, TIMEOUT_S)
        ways = {"split": LaneExchange(port, problem.layout)}
        if region:
            peer.region = mapped(device, problem.layout, region)
            ways["direct"] = DirectExchange(port, problem.layout, device)
        eager.epoch = 1
        eager.send_plan(Exchange(peer))
        port.wait(lambda: pipe.poll(), TIMEOUT_S)
        assert pipe.recv() == "filled"
        driver = StepDriver(watchdog, TIMEOUT_S)
        number, held = 0, problem.context
        ids = torch.zeros(problem.batch, dtype=torch.int64)
        measured: list[StepTimes] = []

        def run() -> float:
            nonlocal number, held
            number += 1
            captured.buffers.fill(ids, torch.full_like(ids, held))
            exchange = _exchange(problem, peer, held)
            messages.begin(number, [exchange], captured.buffers)
            eager.begin(number, [exchange], [], way == "direct")
            times = driver.run(captured, messages)
            lost = messages.finish(TIMEOUT_S)
            assert not lost, lost
            held += 1
            measured.append(times)
            return times.attention_s

        found = {}
        runs = [("split", 1), ("halves", 2)][: problem.microbatches] + [("direct", 1)] * bool(region)
        for way, microbatches in runs:
            messages = ways["direct" if way == "direct" else "split"]
            messages.epoch = 1
            captured = steps.of(StepSize(problem.batch, microbatches), way == "direct")
            measured.clear()
            found[way] = median_ms(problem, run)
            if way == "split":
                whole = measured[problem.warm_up :]
        if problem.microbatches > 1:
            found["halves"]["predicted"] = 1e3 * predicted_s(whole, problem.config.num_layers, 2)
        pipe.send("end")
        captures = pipe.recv()
        expected = len(runs), problem.microbatches
        assert (steps.captures, captures) == expected, (steps.captures, captures)
        return found


def _exchange(problem: Problem, peer: Peer, held: int) -> Exchange:
    rows = [(slot, 1, 1, held, held) for slot in range(problem.batch)]
    everything = slice(0, problem.batch)
    layers = problem.shape.layers_per_kv(problem.batch)
    return Exchange(peer, rows, everything, problem.batch, everything, layers)


# On a GPU


def gpu() -> Any:
    from flume_kernels.gpu.cuda_device import CudaDevice

    return CudaDevice()


def run_one(problem: Problem, pipe: Connection) -> None:
    from flume_attention.cuda.ops import TritonAttention
    from flume_weight.cuda.ops import TritonOps

    device = gpu()
    pipe.send(one_process(problem, device, TritonOps(), TritonAttention(problem.layout, device.name)))


def run_attention(problem: Problem, pipe: Connection, lane: int = 1) -> None:
    from flume_attention.cuda.ops import TritonAttention

    device = gpu()
    attention_node(problem, device, TritonAttention(problem.layout, device.name), pipe, lane)


def run_weight(problem: Problem, peer: Connection, pipe: Connection) -> None:
    from flume_weight.cuda.ops import TritonOps

    device = gpu()
    pipe.send(weight_node(problem, device, TritonOps(), device.name, peer))


def measure(problem: Problem) -> dict[str, dict[str, float]]:
    """Each side in processes of its own, one after the other: both would not fit the card at once."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    found: dict[str, dict[str, float]] = {
        "one": _answer(ours, [context.Process(target=run_one, args=(problem, theirs))])
    }
    weight, attention = context.Pipe()
    sides = [
        context.Process(target=run_attention, args=(problem, attention)),
        context.Process(target=run_weight, args=(problem, weight, theirs)),
    ]
    return found | _answer(ours, sides)


def _answer(pipe: Connection, processes: list[Any]) -> Any:
    for process in processes:
        process.start()
    while not pipe.poll(0.2):
        if any(process.exitcode for process in processes):
            raise SystemExit("a process of the benchmark failed")
    answer = pipe.recv()
    for process in processes:
        process.join(TIMEOUT_S)
    return answer


def _halves(found: dict[str, dict[str, float]]) -> str:
    if "halves" not in found:
        return ""
    halves = found["halves"]
    error = halves["predicted"] / halves["step"] - 1
    return f"; in halves {halves['step']:.2f} ms, predicted {halves['predicted']:.2f} ({error:+.1%})"


def _direct(found: dict[str, dict[str, float]]) -> str:
    if "direct" not in found:
        return ""
    step = found["direct"]["step"]
    return f"; direct {step:.2f} ms, {step / found['one']['step']:.3f} x"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["8b", "70b-tp8", "tiny"], default="8b")
    parser.add_argument("--layers", type=int, default=0, help="Fewer than the model has.")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[8192])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--microbatches", type=int, choices=[1, 2], default=1, help="2: measured, too.")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for batch in args.batch:
        for context in args.context:
            config = model(args.model, args.layers, context)
            found = measure(
                Problem(config, torch.bfloat16, batch, context, args.steps, microbatches=args.microbatches)
            )
            ratio = found["split"]["step"] / found["one"]["step"]
            rows.append({"model": args.model, "batch": batch, "context": context, **found, "ratio": ratio})
            print(
                f"{args.model} {batch} x {context}: one {found['one']['step']:.2f} ms, split"
                f" {found['split']['step']:.2f} ms (attention {found['split']['attention']:.2f}),"
                f" {ratio:.3f} x{_halves(found)}{_direct(found)}",
                flush=True,
            )
            if args.out:
                args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
