"""What growing contexts cost as attention nodes join: whole decode steps, stage by stage, under MPS.

    python bench/gpu_growth.py --model 8b --batch 32 --per-node 8192 --nodes 4 [--out growth.json]

In each stage one more attention node joins and holds the next --per-node tokens of every sequence: with four
of 8192 the contexts grow from 8K to 32K, and no node ever reads more than the first did. Two models stand
beside what is measured:

    this card    base + bytes of keys and values / read bandwidth     all nodes share one memory
    own cards    base + what the first node took alone                each node reads its own

`base` is the same number of nodes with next to no keys: the dense path, and the hops, which are direct where
the nodes can. Milliseconds a step.
Keys and values of 32 x 32K of 8b are more than a card holds beside the weights: --layers-per-memory 2, the
default, lets two layers lie in one place, each of which is read anew as often as if it had its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from flume_common.lanes import Port, Side
from flume_kernels.gpu.watchdog import Watchdog
from flume_weight.cuda.buckets import StepSize
from flume_weight.cuda.captured_steps import CapturedSteps
from flume_weight.cuda.direct_exchange import DirectExchange, can_be_direct
from flume_weight.cuda.driver import StepDriver
from flume_weight.cuda.lane_exchange import LaneExchange
from flume_weight.cuda.ops import Ops
from flume_weight.peer import Peer
from flume_weight.range_attention import Exchange, RangeAttention
from gpu_step import TIMEOUT_S, Problem, gpu, mapped, model, random_weights, run_attention

LEAST_TOKENS = 16  # of a node that joins
FLAT = 1.15  # of the first stage: what is asked for
LIMIT_MS = 20.0  # of p99 in the first stage
Start = Callable[[Problem, int], Connection]
"""Starts the attention node of a lane; its end of the pipe."""


@dataclass(frozen=True)
class Stage:
    """Milliseconds of the steps with so many nodes; `context` is that of the one in the middle."""

    nodes: int
    context: int
    p50: float
    p99: float
    worst: float


@dataclass(frozen=True)
class Row:
    """A stage beside its models, in milliseconds."""

    stage: Stage
    base: float
    this_card: float
    own_cards: float


def predict(
    base: Sequence[Stage], found: Sequence[Stage], row_token_bytes: int, bandwidth: float
) -> list[Row]:
    """`row_token_bytes`: what a step reads for one token of context in every row; bandwidth in bytes/s."""
    alone = found[0].p50 - base[0].p50
    return [
        Row(
            stage,
            base=empty.p50,
            this_card=empty.p50 + 1e3 * (stage.context - empty.context) * row_token_bytes / bandwidth,
            own_cards=empty.p50 + alone,
        )
        for empty, stage in zip(base, found, strict=True)
    ]


# The weight node


class Growing:
    """Sequences of a batch that grow side by side: the newest node holds their tails, the others the past."""

    def __init__(self, problem: Problem, nodes: int, device: Any, ops: Ops, port: Port, watchdog: Watchdog):
        self._problem = problem
        self._port = port
        weights = random_weights(problem, device.name)
        self._device = device
        self._steps = CapturedSteps(device, ops, problem.config, weights, parts=nodes)
        self._eager = RangeAttention(port, problem.layout, problem.layout.head_dim**-0.5, TIMEOUT_S)
        self._ways = (LaneExchange(port, problem.layout), DirectExchange(port, problem.layout, device))
        self._eager.epoch = 1
        self._driver = StepDriver(watchdog, TIMEOUT_S)
        self._ids = torch.zeros(problem.batch, dtype=torch.int64)
        self._number = 0
        self._held: dict[Peer, int] = {}  # tokens of each sequence, in order of joining
        self._pipes: list[Connection] = []

    @property
    def context(self) -> int:
        return sum(self._held.values())

    def join(self, pipe: Connection, tokens: int) -> None:
        """One more node, which holds the newest `tokens` of each sequence as soon as it has its slots."""
        lane_number = 1 + 2 * len(self._pipes)
        self._pipes.append(pipe)
        pipe.send(self._port.address)
        address = pipe.recv()
        region = pipe.recv()
        lane = self._port.connect(
            f"attention-{len(self._pipes)}", address, self._problem.shape, Side.WEIGHT,
            send_lane=lane_number + 1, receive_lane=lane_number,
        )  # fmt: skip
        peer = Peer(f"attention-{len(self._pipes)}", lane, self._problem.blocks)
        if region:
            peer.region = mapped(self._device, self._problem.layout, region)
        for slot in range(self._problem.batch):
            peer.open(slot, self.context, slot)
        self._eager.send_plan(Exchange(peer))
        self._port.wait(lambda: pipe.poll(), TIMEOUT_S)
        assert pipe.recv() == "filled"
        self._held[peer] = tokens

    def step(self) -> float:
        """One token of every sequence; seconds."""
        start = time.perf_counter()
        context = self.context
        self._number += 1
        exchanges = [self._exchange(peer, context) for peer in self._held]
        direct = can_be_direct(exchanges)
        captured, messages = self._steps.of(StepSize(self._problem.batch), direct), self._ways[direct]
        captured.buffers.fill(self._ids, torch.full_like(self._ids, context))
        messages.epoch = 1
        messages.begin(self._number, exchanges, captured.buffers)
        self._eager.begin(self._number, exchanges, [], direct)
        self._driver.run(captured, messages)
        lost = messages.finish(TIMEOUT_S)
        assert not lost, lost
        self._held[self._tail] += 1
        return time.perf_counter() - start

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.send("end")
            pipe.recv()

    @property
    def _tail(self) -> Peer:
        return next(reversed(self._held))

    def _exchange(self, peer: Peer, context: int) -> Exchange:
        batch, held, grows = self._problem.batch, self._held[peer], peer is self._tail
        rows = [(slot, 1, int(grows), held, context) for slot in range(batch)]
        exchange = Exchange(peer, rows, slice(0, batch), batch)
        if grows:
            exchange.append = slice(0, batch)
            exchange.layers_per_kv = self._problem.shape.layers_per_kv(batch)
        return exchange


def grow(problem: Problem, nodes: int, device: Any, ops: Ops, start: Start) -> list[Stage]:
    """Of each stage the steps but the first ones, in which a node captures its own."""
    found = []
    with torch.inference_mode(), Port() as port, Watchdog() as watchdog:
        growing = Growing(problem, nodes, device, ops, port, watchdog)
        for number in range(nodes):
            tokens = max(problem.context * (number + 1) - growing.context, LEAST_TOKENS)
            growing.join(start(replace(problem, context=tokens), 1 + 2 * number), tokens)
            for _ in range(problem.warm_up):
                growing.step()
            context = growing.context + problem.steps // 2
            times = [1e3 * growing.step() for _ in range(problem.steps)]
            found.append(Stage(number + 1, context, statistics.median(times), p99(times), max(times)))
        growing.end()
    return found


def p99(times: Sequence[float]) -> float:
    """The smallest that all but one in a hundred do not exceed."""
    return sorted(times)[-(-99 * len(times) // 100) - 1]


# On a GPU


def run_weight(problem: Problem, nodes: int, pipe: Connection) -> None:
    from flume_weight.cuda.ops import TritonOps

    context = multiprocessing.get_context("spawn")

    def start(node: Problem, lane: int) -> Connection:
        ours, theirs = context.Pipe()
        context.Process(target=run_attention, args=(node, theirs, lane), daemon=True).start()
        return ours

    pipe.send(grow(problem, nodes, gpu(), TritonOps(), start))


def run_bandwidth(pipe: Connection) -> None:
    from flume_kernels.gpu.bandwidth import read_bandwidth

    pipe.send(read_bandwidth())


def answer(run: Callable[..., None], *args: Any) -> Any:
    """What a process of its own has to say: its memory is free again when it is gone."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run, args=(*args, theirs))
    process.start()
    while not ours.poll(0.2):
        if process.exitcode is not None:
            raise SystemExit("a process of the benchmark failed")
    found = ours.recv()
    process.join(TIMEOUT_S)
    return found


def table(rows: Sequence[Row]) -> list[str]:
    """Lines for people, and what was asked for."""
    lines = [f"{'nodes':>5} {'context':>8} {'p50':>8} {'p99':>8} {'worst':>8} {'base':>8} {'this card':>10}"
             f" {'measured/model':>15} {'own cards':>10} {'of the first':>13}"]  # fmt: skip
    for row in rows:
        stage = row.stage
        lines.append(
            f"{stage.nodes:5} {stage.context:8} {stage.p50:8.2f} {stage.p99:8.2f} {stage.worst:8.2f}"
            f" {row.base:8.2f} {row.this_card:10.2f} {stage.p50 / row.this_card:15.3f} {row.own_cards:10.2f}"
            f" {row.own_cards / rows[0].own_cards:13.3f}"
        )
    first, flat = rows[0].stage.p99, max(row.own_cards for row in rows) / rows[0].own_cards
    return [
        *lines,
        f"p99 of the first stage {first:.2f} ms, to be under {LIMIT_MS:.0f}: {_verdict(first < LIMIT_MS)}",
        f"on own cards {flat:.3f} of the first stage, at most {FLAT}: {_verdict(flat <= FLAT)}",
    ]


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["8b", "70b-tp8", "tiny"], default="8b")
    parser.add_argument("--layers", type=int, default=0, help="Fewer than the model has.")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--per-node", type=int, default=8192, help="Tokens of a sequence on one node.")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300, help="Of each stage.")
    parser.add_argument("--layers-per-memory", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    longest = args.nodes * (args.per_node + args.steps + 16)
    problem = Problem(
        model(args.model, args.layers, longest), torch.bfloat16, args.batch, args.per_node, args.steps,
        layers_per_memory=args.layers_per_memory,
    )  # fmt: skip
    bandwidth = answer(run_bandwidth)
    base = answer(run_weight, replace(problem, context=LEAST_TOKENS), args.nodes)
    stages = answer(run_weight, problem, args.nodes)
    rows = predict(base, stages, problem.batch * problem.layout.token_bytes, bandwidth)
    print(f"{args.model}, batch {args.batch}, {bandwidth / 1e12:.2f} TB/s")
    print("\n".join(table(rows)), flush=True)
    if args.out:
        found = {"model": args.model, "batch": args.batch, "bandwidth": bandwidth}
        args.out.write_text(json.dumps(found | {"rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
