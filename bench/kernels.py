"""GPU kernels beside others on the same card: what share of its measured read bandwidth each reaches.

    python bench/kernels.py [--out bench/results/kernels.json] [--tune]

Every time is that of a launch inside a captured graph, the median of replays. Ours reads random blocks of a
pool; cuDNN, torch flash and FlexAttention read contiguous keys and values, FlashInfer (when it is
installed) the same random blocks. Each answer is compared with torch's in float32 before its time counts.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from flume_kernels.gpu.attention_plan import AttentionPlan, PlanShape
from flume_kernels.gpu.bandwidth import read_bandwidth
from flume_kernels.gpu.decode_attention import DecodeConfig
from flume_kernels.gpu.decode_tuning import (
    DecodeProblem,
    DecodeRun,
    decode_config,
    tune_decode,
)
from flume_kernels.gpu.kv_append import kv_append
from flume_kernels.gpu.kv_pool import FP8, KvPool
from flume_kernels.gpu.linear_tuning import LinearProblem, LinearRun, known_config, model_problems
from flume_kernels.gpu.merge_partials import merge_partials
from flume_kernels.gpu.rms_norm import rms_norm
from flume_kernels.gpu.rope import rope
from flume_kernels.gpu.sampling import greedy, greedy_workspace_size, sample
from flume_kernels.gpu.shortlist import SUMS, shortlist
from flume_kernels.gpu.silu_mul import silu_mul
from flume_kernels.gpu.skinny_linear import SkinnyConfig
from flume_kernels.gpu.timing import graph_seconds
from flume_kernels.gpu.tuning import TuningCache, default_path
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = ((8, 32768), (32, 8192), (64, 8192), (1, 131072))
BLOCKS = (16, 32, 64, 128)
TOLERANCE = 2e-2  # of bf16 results whose values shrink with the number of keys, relative to the largest

Row = dict[str, Any]
Way = Callable[[], Tensor]  # one layer's attention: the answer of [rows, query_heads, head_dim] elements


def contiguous(run: DecodeRun) -> tuple[Tensor, Tensor]:
    """The same keys and values as [rows, kv_heads, length, head_dim]."""
    problem = run.problem
    kv = run.pool.kv[run.tables.long().flatten()]
    kv = kv.view(problem.rows, -1, *kv.shape[1:]).permute(2, 0, 3, 1, 4, 5)
    kv = kv.reshape(2, problem.rows, problem.num_kv_heads, -1, problem.head_dim)
    return kv[0].contiguous(), kv[1].contiguous()


def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """float32 attention [rows, query_heads, head_dim], one row at a time for want of memory."""
    rows = [
        F.scaled_dot_product_attention(
            q[row, None, :, None].float(), k[row, None].float(), v[row, None].float(), enable_gqa=True
        )[0, :, 0]
        for row in range(q.shape[0])
    ]
    return torch.stack(rows)


def worst(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value; nan counts as infinite."""
    error = ((got.float() - want).abs().max() / want.abs().max()).item()
    return math.inf if math.isnan(error) else error


def sdpa(run: DecodeRun, k: Tensor, v: Tensor, backend: SDPBackend) -> Way:
    q = run.q.unsqueeze(2)

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return call


def flex(run: DecodeRun, k: Tensor, v: Tensor) -> Way:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    q = run.q.unsqueeze(2)
    return lambda: compiled(q, k, v, enable_gqa=True)


def flashinfer(run: DecodeRun) -> Way:
    import flashinfer

    problem = run.problem
    blocks = run.tables.shape[1]
    work = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(work, "HND", use_tensor_cores=True)
    wrapper.plan(
        torch.arange(problem.rows + 1, dtype=torch.int32, device="cuda") * blocks,
        run.tables.flatten(),
        torch.full((problem.rows,), problem.block_tokens, dtype=torch.int32, device="cuda"),
        problem.num_query_heads, problem.num_kv_heads, problem.head_dim, problem.block_tokens,
        q_data_type=run.q.dtype, kv_data_type=run.pool.kv.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(run.q, run.pool.kv)


def ours(run: DecodeRun, config: DecodeConfig) -> Way:
    layer = run.prepare(config)

    def call() -> Tensor:
        layer()
        return run.o

    return call


def timed(name: str, make: Callable[[], Way], want: Tensor) -> Row:
    """Seconds and error of one way of computing the same; a way that does not run says why."""
    try:
        call = make()
        error = worst(call().reshape(want.shape), want)
        if error > TOLERANCE:
            return {"kernel": name, "failed": f"answer is off by {error:.3g}"}
        return {"kernel": name, "seconds": graph_seconds(call), "error": error}
    except Exception as problem:
        return {"kernel": name, "failed": f"{type(problem).__name__}: {str(problem)[:80]}"}


def attention_rows(problem: DecodeProblem, cache: TuningCache, compare: bool) -> list[Row]:
    """Ours, and the others when `compare`, for one shape."""
    run = DecodeRun(problem, "cuda")
    k, v = contiguous(run)
    want = truth(run.q, k, v)
    config = decode_config(problem, cache, "cuda")
    ways: dict[str, Callable[[], Way]] = {
        f"ours, blocks of {problem.block_tokens}": lambda: ours(run, config)
    }
    if compare:
        ways["cuDNN"] = lambda: sdpa(run, k, v, SDPBackend.CUDNN_ATTENTION)
        ways["torch flash"] = lambda: sdpa(run, k, v, SDPBackend.FLASH_ATTENTION)
        ways["FlexAttention"] = lambda: flex(run, k, v)
        ways[f"FlashInfer, blocks of {problem.block_tokens}"] = lambda: flashinfer(run)
    rows = [timed(name, make, want) for name, make in ways.items()]
    rows[0]["config"] = repr(config)
    return [{"shape": f"{problem.rows}x{problem.length}", "bytes": problem.kv_bytes, **row} for row in rows]


def attention_table(cache: TuningCache) -> list[Row]:
    rows = []
    for count, length in SHAPES:
        problem = DecodeProblem(32, 8, 128, 16, torch.bfloat16, rows=count, length=length)
        for block_tokens in BLOCKS:
            rows += attention_rows(
                replace(problem, block_tokens=block_tokens), cache, block_tokens == BLOCKS[0]
            )
            torch.cuda.empty_cache()
    return rows


def ragged_row(cache: TuningCache) -> Row:
    """32 rows of lengths from 0 to 64K, one of them, with the bytes they really hold."""
    lengths = torch.tensor([65536] + [1024 * (i % 16) for i in range(31)], dtype=torch.int32, device="cuda")
    problem = DecodeProblem(32, 8, 128, 16, torch.bfloat16, rows=32, length=65536)
    run = DecodeRun(problem, "cuda")
    run.lengths.copy_(lengths)
    config = decode_config(problem, cache, "cuda")
    held = int(lengths.sum()) * problem.kv_bytes // (problem.rows * problem.length)
    return {
        "shape": "ragged 32",
        "bytes": held,
        "kernel": "ours, blocks of 16",
        "seconds": run.seconds(config),
    }


def fp8_row(cache: TuningCache) -> Row:
    problem = DecodeProblem(32, 8, 128, 16, FP8, rows=8, length=32768)
    seconds = DecodeRun(problem, "cuda").seconds(decode_config(problem, cache, "cuda"))
    return {
        "shape": "8x32768 fp8",
        "bytes": problem.kv_bytes,
        "kernel": "ours, blocks of 16",
        "seconds": seconds,
    }


def spread_row(cache: TuningCache) -> Row:
    """The same keys in a pool eight times as large: what translation of addresses costs."""
    problem = DecodeProblem(32, 8, 128, 16, torch.bfloat16, rows=8, length=32768)
    seconds = DecodeRun(problem, "cuda", spare=8).seconds(decode_config(problem, cache, "cuda"))
    return {
        "shape": "8x32768 in 8x",
        "bytes": problem.kv_bytes,
        "kernel": "ours, blocks of 16",
        "seconds": seconds,
    }


def chunk_row(cache: TuningCache) -> Row:
    """A prefill chunk of 512 tokens over 32K held ones; bound by arithmetic, so its FLOP/s are given."""
    problem = DecodeProblem(32, 8, 128, 16, torch.bfloat16, queries=512, rows=1, length=32768)
    seconds = DecodeRun(problem, "cuda").seconds(decode_config(problem, cache, "cuda"))
    flops = 4 * problem.queries * problem.num_query_heads * problem.head_dim * problem.length
    return {
        "shape": "512 queries x 32768", "bytes": problem.kv_bytes, "kernel": "ours, blocks of 16",
        "seconds": seconds, "tflops": flops / seconds / 1e12,
    }  # fmt: skip


def product_rows(name: str, problem: LinearProblem, cache: TuningCache) -> list[Row]:
    """One matrix: torch's product alone, that with the kernels for norm and gate beside it, and ours."""
    run = LinearRun(problem, "cuda")
    want = run.exact()
    known = known_config(problem, cache, torch.cuda.get_device_name())
    config = known[0] if known else SkinnyConfig()
    ours = "ours" if known else "ours, not tuned"
    rows: list[Row] = [
        {"kernel": "F.linear", "seconds": run.seconds_of(lambda weight: F.linear(run.x, weight))},
        {"kernel": f"torch, {problem.fusion}", "seconds": run.seconds(None)},
    ]
    if run.is_right(config, want):
        rows.append({"kernel": ours, "seconds": run.seconds(config), "config": repr(config)})
    else:
        rows.append({"kernel": ours, "failed": "answers wrongly, or not the same twice"})
    shape = {"shape": f"{name}, batch {problem.rows}", "bytes": problem.weight_bytes}
    return [shape | row for row in rows]


def product_table(cache: TuningCache) -> list[Row]:
    """The products of Llama-3.1-8B; bytes are those of the weights."""
    rows = []
    for batch in (1, 8, 32):
        problems = model_problems(batch, 4096, 4096, 2048, 14336, 128256, torch.bfloat16)
        for name, problem in problems.items():
            rows += product_rows(name, problem, cache)
            torch.cuda.empty_cache()
    return rows


def small_rows(batch: int = 32) -> list[Row]:
    """The dense path's small kernels at Llama-3.1-8B's sizes; bytes are read plus written."""
    bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
    x, weight, gate_up = (
        torch.randn(batch, 4096, **bf16),
        torch.ones(4096, **bf16),
        torch.randn(batch, 28672, **bf16),
    )
    out, gated, logits = (
        torch.empty_like(x),
        torch.empty(batch, 14336, **bf16),
        torch.randn(batch, 128256, **bf16),
    )
    residual, angles = x.clone(), torch.zeros(32768, 64, device="cuda")
    longs = torch.arange(batch, device="cuda")
    kv = torch.randn(2, batch, 8, 128, **bf16)
    pool = KvPool(torch.zeros(batch, 2, 8, 16, 128, **bf16))
    partials, lse = torch.randn(2, batch, 32, 128, **bf16), torch.zeros(2, batch, 32, device="cuda")
    out_lse = torch.empty(batch, 32, device="cuda")
    ones = torch.ones(batch, device="cuda")
    work = torch.empty(greedy_workspace_size(batch, 128256), dtype=torch.int64, device="cuda")
    shape = PlanShape(batch, batch, 32768, 32, 8)
    plan = AttentionPlan.allocate(shape, 128, "cuda")
    lengths = torch.full((batch,), 8192, dtype=torch.int32, device="cuda")
    top_k = torch.full((batch,), 50, dtype=torch.int32, device="cuda")
    all_k, all_p = torch.zeros_like(top_k), ones * 0.9
    q, out_q, twice = x.view(batch, 32, 128), out.view(batch, 32, 128), 2 * logits.nbytes
    drawn = longs.clone()
    found = torch.empty(batch, 65, dtype=torch.int32, device="cuda"), torch.empty(batch, 65, device="cuda")
    heat = {each: torch.full((batch,), each, dtype=torch.float64, device="cuda") for each in (0.0, 1.0)}
    wants = {each: torch.full((batch,), each, device="cuda") for each in (0, 1)}
    sums = torch.empty(batch, SUMS, device="cuda")

    def listed(temperature: float, candidates: int) -> None:
        shortlist(logits, longs, heat[temperature], wants[candidates], *found, sums)

    runs: dict[str, tuple[Callable[[], None], int]] = {
        "rms_norm + residual": (lambda: rms_norm(x, weight, out, 1e-5, residual), 4 * x.nbytes),
        "rope, q": (lambda: rope(q, longs, angles, angles, out_q), 2 * x.nbytes),
        "silu_mul": (lambda: silu_mul(gate_up, gated), gate_up.nbytes + gated.nbytes),
        "kv_append": (lambda: kv_append(pool, kv[0], kv[1], longs * 16), 2 * kv.nbytes),
        "merge of 2 partials": (lambda: merge_partials(partials, lse, out_q, out_lse), 3 * x.nbytes),
        "greedy": (lambda: greedy(logits, drawn, work), logits.nbytes),
        "sample": (lambda: sample(logits, ones, all_k, ones, longs, longs, drawn), twice),
        "sample, top-k 50, top-p 0.9": (
            lambda: sample(logits, ones, top_k, all_p, longs, longs, drawn),
            twice,
        ),
        "shortlist, largest alone": (lambda: listed(0.0, 0), logits.nbytes),
        "shortlist, a draw": (lambda: listed(1.0, 0), logits.nbytes),
        "shortlist, a draw and 64 candidates": (lambda: listed(1.0, 1), logits.nbytes),
        "attention plan": (lambda: plan.update(lengths), 0),
    }
    return [
        {"shape": f"batch {batch}", "kernel": name, "bytes": moved, "seconds": graph_seconds(call)}
        for name, (call, moved) in runs.items()
    ]


def print_table(rows: list[Row], bandwidth: float) -> None:
    write = sys.stdout.write
    write(f"{'shape':22} {'kernel':28} {'µs':>9} {'GB/s':>7} {'of read':>8}\n")
    for row in rows:
        if "failed" in row:
            write(f"{row['shape']:22} {row['kernel']:28} {row['failed']}\n")
            continue
        rate = row["bytes"] / row["seconds"]
        more = f"  {row['tflops']:.0f} TFLOP/s" if "tflops" in row else ""
        write(
            f"{row['shape']:22} {row['kernel']:28} {row['seconds'] * 1e6:9.1f} {rate / 1e9:7.0f} "
            f"{rate / bandwidth:8.1%}{more}\n"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/kernels.json"))
    parser.add_argument("--tuning", type=Path, default=default_path(), help="file of known configurations")
    parser.add_argument("--tune", action="store_true", help="measure configurations first and keep them")
    parser.add_argument("--tune-only", action="store_true", help="do that and nothing else")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("no GPU here: nothing to measure\n")
        return 2
    torch.manual_seed(0)
    cache = TuningCache(options.tuning)
    if options.tune or options.tune_only:
        for block_tokens in BLOCKS:
            problem = DecodeProblem(32, 8, 128, block_tokens, torch.bfloat16)
            tune_decode([problem, replace(problem, rows=1, length=131072)], cache, "cuda")
        tune_decode([DecodeProblem(32, 8, 128, 16, FP8)], cache, "cuda")
        tune_decode([DecodeProblem(32, 8, 128, 16, torch.bfloat16, 512, 1)], cache, "cuda")
    if options.tune_only:
        return 0
    bandwidth = read_bandwidth()
    gpu = torch.cuda.get_device_name()
    sys.stdout.write(f"{gpu}, torch {torch.__version__}, triton {triton.__version__}: ")
    sys.stdout.write(f"reads {bandwidth / 1e12:.3f} TB/s\n")
    rows = attention_table(cache)
    rows += [ragged_row(cache), spread_row(cache), fp8_row(cache), chunk_row(cache)]
    rows += [*small_rows(), *product_table(cache)]
    print_table(rows, bandwidth)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}
    options.out.write_text(json.dumps(result | {"read_bytes_per_s": bandwidth, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
