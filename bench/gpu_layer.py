"""Where each microsecond of a decode step goes on the weight node, and what the dense path costs at least.

    python bench/gpu_layer.py --model 8b --batch 8 [--out layer.json]

Every phase is captured alone, once for each layer with that layer's weights, so that none is found in a
cache; what is given is its time per layer, and beside it the least time in which its weights could be read.
`whole` is the captured step itself, its waits for attention left out: what it takes beyond the sum of its
phases, or less, is what lies between them. Random weights. `step / least` is the step over the time of
reading all weights once at the bandwidth measured here. K and V count a norm of their own; the step shares
it with Q where neither product takes it in.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flume_weight.cuda.buckets import StepSize
from flume_weight.cuda.decode_step import DecodeStep
from flume_weight.cuda.ops import Angles, Ops
from flume_weight.cuda.products import Normed
from flume_weight.cuda.step_buffers import StepBuffers
from flume_weight.model.linear import Linear
from flume_weight.model.weights import Layer, Weights
from gpu_step import Problem, model, random_weights

REPLAYS = 21
Phase = Callable[[int, Layer], None]  # queues one phase of one layer


@dataclass(frozen=True)
class Found:
    """One line of the table; seconds of one layer, or of the step where `per_step`."""

    phase: str
    seconds: float
    weight_bytes: int = 0
    per_step: bool = False


class Alone:
    """A device on which nobody is waited for: what the step costs when attention is there at once."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def await_(self, flags: Any, number: int) -> None: ...


class Layers:
    """The phases of a layer as `DecodeStep` queues them, each by itself."""

    def __init__(
        self, device: Any, ops: Ops, problem: Problem, weights: Weights, buffers: StepBuffers
    ) -> None:
        config, where = problem.config, weights.embedding.device
        self._device, self._ops, self._config, self._buffers = device, ops, config, buffers
        (self._part,) = buffers.microbatches
        self._angles = Angles.of(config, where)
        self._positions = torch.zeros(problem.batch, dtype=torch.int64, device=where)

        def made(*size: int) -> torch.Tensor:
            return torch.randn(problem.batch, *size, dtype=problem.dtype, device=where)

        self._hidden, self._added_to = made(config.hidden_size), made(config.hidden_size)
        self._q, self._turned = (made(config.num_query_heads, config.head_dim) for _ in range(2))
        self._k, self._v = (made(config.num_kv_heads, config.head_dim) for _ in range(2))
        self._mixed = made(config.query_size)
        self._inner = made(config.intermediate_size)

    def phases(self) -> dict[str, tuple[Phase, Callable[[Layer], Linear | None]]]:
        """By name: what to queue, and the matrix that it reads."""
        ops, part, nothing = self._ops, self._part, lambda layer: None
        turned_k = torch.empty_like(self._k)
        eps, scale = self._config.rms_norm_eps, self._config.head_dim**-0.5

        def normed(of: Callable[[Layer], Linear]) -> tuple[Phase, Callable[[Layer], Linear]]:
            return lambda _, layer: void(
                ops.linear(of(layer), Normed(self._hidden, layer.input_norm, eps))
            ), of

        def added(of: Callable[[Layer], Linear], x: torch.Tensor) -> tuple[Phase, Callable[[Layer], Linear]]:
            return lambda _, layer: ops.linear_add(of(layer), x, self._added_to), of

        def gate(number: int, layer: Layer) -> None:
            ops.gate(layer.gate_up, Normed(self._hidden, layer.post_norm, eps))

        def turn(number: int, layer: Layer) -> None:
            ops.rope(self._q, self._positions, self._angles, self._turned, part.queries)

        def turn_keys(number: int, layer: Layer) -> None:
            ops.rope_keys(self._k, self._v, self._positions, self._angles, turned_k, part.keys[number])

        def merge(number: int, layer: Layer) -> None:
            ops.merge(self._turned, self._k, self._v, part.part_o, part.part_lse, scale)

        return {
            "norm and Q": normed(lambda layer: layer.query),
            "RoPE of Q, into the send buffer": (turn, nothing),
            "signal": (lambda number, layer: self._device.signal(self._buffers.flags, 1), nothing),
            "norm, K and V": normed(lambda layer: layer.kv),
            "RoPE of K, K and V into the send buffer": (turn_keys, nothing),
            "merge": (merge, nothing),
            "O and residual": added(lambda layer: layer.output, self._mixed),
            "norm, gate and up, SiLU": (gate, lambda layer: layer.gate_up),
            "down and residual": added(lambda layer: layer.down, self._inner),
        }  # fmt: skip


def void(result: object) -> None:
    """A phase queues and gives nothing back."""


def seconds(device: Any, run: Callable[[], None]) -> float:
    """One replay of what `run` queues, from launch to end: the median of some."""
    device.warm_up(run)
    graph = device.capture(run)
    times = []
    for _ in range(REPLAYS):
        start = time.perf_counter()
        graph.launch()
        while not graph.done():
            pass
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(device: Any, ops: Ops, problem: Problem) -> Iterator[Found]:
    """Phase by phase, then the step as a whole."""
    weights = random_weights(problem, device.name)
    buffers = StepBuffers.allocate(device, problem.config, StepSize(problem.batch), 1, problem.dtype)
    buffers.fill(torch.zeros(problem.batch, dtype=torch.int64), torch.zeros(problem.batch, dtype=torch.int64))
    count = problem.config.num_layers
    empty = seconds(device, lambda: device.signal(buffers.flags, 1))  # launching a graph, and its only kernel
    layers = Layers(device, ops, problem, weights, buffers)
    for name, (phase, reads) in layers.phases().items():

        def run(phase: Phase = phase) -> None:
            for number, layer in enumerate(weights.layers):
                phase(number, layer)

        matrix = reads(weights.layers[0])
        took = max(seconds(device, run) - (empty if name != "signal" else 0.0), 0.0)
        yield Found(name, took / count, 0 if matrix is None else _bytes(matrix))
    hidden = torch.randn(problem.batch, problem.config.hidden_size, dtype=problem.dtype, device=device.name)
    last = Normed(hidden, weights.final_norm, problem.config.rms_norm_eps)
    head = seconds(device, lambda: void(ops.linear(weights.head, replace(last))))
    yield Found("norm and head", max(head - empty, 0.0), _bytes(weights.head), per_step=True)
    asks = buffers.shortlists.asks.to(device.name)
    looked = seconds(device, lambda: ops.shortlist(buffers.logits, asks, buffers.shortlists))
    yield Found("shortlists of the logits", max(looked - empty, 0.0), per_step=True)
    buffers.flags.rearm()
    angles = Angles.of(problem.config, weights.embedding.device)
    step = DecodeStep(Alone(device), ops, problem.config, weights, angles, buffers)
    every = sum(_bytes(linear) for layer in weights.layers for linear in layer.linears)
    yield Found("whole", seconds(device, step), every + _bytes(weights.head), per_step=True)


def _bytes(linear: Linear) -> int:
    return linear.weight.numel() * linear.weight.element_size()


def report(found: list[Found], layers: int, bandwidth: float) -> list[str]:
    """Lines for people. The least time of a phase is that of reading its weights."""
    lines = [f"{'phase':40} {'µs/layer':>9} {'least':>7} {'of step':>8}"]
    whole = found[-1]
    listed = 0.0
    for each in found[:-1]:
        times = 1 if each.per_step else layers
        listed += each.seconds * times
        per = 1e6 * each.seconds * times / layers
        least = 1e6 * each.weight_bytes / bandwidth * times / layers
        share = each.seconds * times / whole.seconds
        lines.append(f"{each.phase:40} {per:9.2f} {least or '':7.4} {share:8.1%}")
    between = whole.seconds - listed
    lines.append(f"{'between phases':40} {1e6 * between / layers:9.2f} {'':7} {between / whole.seconds:8.1%}")
    least_s = whole.weight_bytes / bandwidth
    lines.append(
        f"whole: {1e3 * whole.seconds:.3f} ms; reading {whole.weight_bytes / 1e9:.2f} GB at"
        f" {bandwidth / 1e12:.2f} TB/s takes {1e3 * least_s:.3f} ms;"
        f" step / least {whole.seconds / least_s:.3f}"
    )
    return lines


def main() -> None:
    from flume_kernels.gpu.bandwidth import read_bandwidth
    from flume_kernels.gpu.cuda_device import CudaDevice
    from flume_weight.cuda.ops import TritonOps

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["8b", "70b-tp8", "tiny"], default="8b")
    parser.add_argument("--layers", type=int, default=0, help="Fewer than the model has.")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    bandwidth, rows = read_bandwidth(), []
    torch.cuda.empty_cache()
    for batch in args.batch:
        problem = Problem(model(args.model, args.layers, 8192), torch.bfloat16, batch, 8192)
        with torch.inference_mode():
            found = list(measure(CudaDevice(), TritonOps(), problem))
        print(f"{args.model}, batch {batch}")
        print("\n".join(report(found, problem.config.num_layers, bandwidth)), flush=True)
        phases = [{"phase": each.phase, "us": 1e6 * each.seconds, "bytes": each.weight_bytes,
                   "per_step": each.per_step} for each in found]  # fmt: skip
        rows.append({"model": args.model, "batch": batch, "bandwidth": bandwidth, "phases": phases})
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
