"""How decode attention runs best on this card, by shape: known results, and the command that measures them.

    python -m flume_kernels.gpu.decode_tuning --heads 32 8 --head-dim 128 --block-tokens 16

Where nothing is known the default is taken, so a node's start never measures.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache as remember
from pathlib import Path

import torch
import triton

from flume_kernels.gpu import attention_plan, decode_attention
from flume_kernels.gpu.attention_plan import AttentionPlan, PlanShape
from flume_kernels.gpu.decode_attention import OTHER_SHARED_BYTES, DecodeConfig
from flume_kernels.gpu.kv_pool import FP8, KvPool
from flume_kernels.gpu.timing import graph_seconds
from flume_kernels.gpu.tuning import Key, TuningCache, choose, default_path, kernel_hash

DOES_NOT_RUN = (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError)
DECODE_KERNELS = (
    decode_attention._decode_kernel,
    decode_attention._block_ids,
    decode_attention._dot,
    attention_plan._plan_kernel,
    attention_plan._run_length,
)


@dataclass(frozen=True, slots=True)
class DecodeProblem:
    """What the decode kernel is tuned for. Rows and lengths are not part of the bucket: the plan adapts to
    them."""

    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    kv_dtype: torch.dtype
    queries: int = 1  # of each row
    rows: int = 8
    length: int = 32768

    @property
    def group(self) -> int:
        return self.num_query_heads // self.num_kv_heads

    @property
    def q_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.kv_dtype == FP8 else self.kv_dtype

    @property
    def bucket(self) -> str:
        """Names the fields a configuration depends on."""
        rows = triton.next_power_of_2(self.group * self.queries)
        kv = str(self.kv_dtype).removeprefix("torch.")
        return f"decode d{self.head_dim} {kv} tile{min(max(rows, 16), 128)} block{self.block_tokens}"

    @property
    def kv_bytes(self) -> int:
        """Bytes one call must read."""
        return 2 * self.rows * self.length * self.num_kv_heads * self.head_dim * self.kv_dtype.itemsize


@remember
def decode_hash() -> str:
    """Of the kernels' source, which is read once per process."""
    return kernel_hash(DECODE_KERNELS)


def decode_key(problem: DecodeProblem, gpu: str) -> Key:
    return Key(gpu, triton.__version__, decode_hash(), problem.bucket)


def decode_config(problem: DecodeProblem, cache: TuningCache, device: torch.device | str) -> DecodeConfig:
    """The configuration for a problem on this device: a known one, or the default. Measures nothing."""
    found = cache.get(decode_key(problem, torch.cuda.get_device_name(device)))
    if found is not None:
        return DecodeConfig(**found)
    shared = int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)
    return decode_attention.default_config(
        problem.head_dim, problem.kv_dtype.itemsize, problem.group, problem.queries, shared
    )


def decode_slots(config: DecodeConfig, device: torch.device | str) -> int:
    """Programs resident on this device at once; `PlanShape.slots`."""
    return config.programs_per_sm * int(torch.cuda.get_device_properties(device).multi_processor_count)


def decode_candidates(problem: DecodeProblem, shared_bytes: int) -> list[DecodeConfig]:
    """Configurations worth trying whose stages fit a multiprocessor's `shared_bytes`.

    For decode those with 32 KiB to 192 KiB on their way in one multiprocessor; chunks are bound by
    arithmetic.
    """
    chunk = problem.group * problem.queries > 16
    found = []
    for keys in (64, 128) if chunk else (32, 64, 128):
        stage_bytes = 2 * keys * triton.next_power_of_2(problem.head_dim) * problem.kv_dtype.itemsize
        for stages, programs in itertools.product((3, 4) if chunk else (3, 4, 5, 6, 7), (1, 2, 3, 4)):
            held = programs * (stages - 1) * stage_bytes
            if held <= min(shared_bytes - programs * OTHER_SHARED_BYTES, 192 << 10) and (
                chunk or held >= 32 << 10
            ):
                rows = (64, 128) if chunk else (16,)
                warps = (2, 4) if keys == 32 else (4, 8)
                for tile_rows, count in itertools.product(rows, warps):
                    found.append(DecodeConfig(tile_rows, keys, count, stages, programs))
    return found


class DecodeRun:
    """Memory for one problem: random blocks of a pool that holds `spare` times what is asked for; `run` is
    one layer."""

    def __init__(self, problem: DecodeProblem, device: torch.device | str, spare: int = 1) -> None:
        self.problem = problem
        self.device = device
        blocks_per_row = -(-problem.length // problem.block_tokens)
        num_blocks = problem.rows * blocks_per_row * spare
        shape = (num_blocks, 2, problem.num_kv_heads, problem.block_tokens, problem.head_dim)
        kv = torch.empty(shape, dtype=problem.kv_dtype, device=device)
        for block in range(0, num_blocks, 1024):
            values = torch.randn(kv[block : block + 1024].shape, device=device)
            kv[block : block + 1024] = values.to(problem.kv_dtype)
        scales = torch.ones(1, 2, problem.num_kv_heads, device=device).expand(shape[:3])
        self.pool = KvPool(kv, scales if problem.kv_dtype == FP8 else None)
        order = torch.randperm(num_blocks, device=device)[: problem.rows * blocks_per_row]
        self.tables = order.to(torch.int32).view(problem.rows, blocks_per_row)
        tokens = problem.rows * problem.queries
        self.q = torch.randn(tokens, problem.num_query_heads, problem.head_dim, device=device).to(
            problem.q_dtype
        )
        self.o = torch.empty_like(self.q)
        self.lse = torch.empty(tokens, problem.num_query_heads, device=device)
        self.lengths = torch.full((problem.rows,), problem.length, dtype=torch.int32, device=device)
        starts = torch.arange(problem.rows + 1, dtype=torch.int32, device=device) * problem.queries
        self.starts = starts if problem.queries > 1 else None

    def prepare(self, config: DecodeConfig) -> Callable[[], None]:
        """Plans for `config`; returns one layer's attention."""
        problem = self.problem
        shape = PlanShape(
            problem.rows, problem.rows * problem.queries, problem.length, problem.num_query_heads,
            problem.num_kv_heads, config.tile_rows, config.tile_keys, decode_slots(config, self.device),
        )  # fmt: skip
        plan = AttentionPlan.allocate(shape, problem.head_dim, self.device)
        plan.update(self.lengths, self.starts)
        scale = 1 / math.sqrt(problem.head_dim)
        return lambda: decode_attention.decode_attention(
            self.q, self.pool, self.tables, plan, self.o, self.lse, scale, config
        )

    def seconds(self, config: DecodeConfig) -> float:
        return graph_seconds(self.prepare(config))


def tune_decode(
    problems: Sequence[DecodeProblem], cache: TuningCache, device: torch.device | str
) -> DecodeConfig:
    """Measure every candidate on all problems, which share a bucket, and keep the one with the least total
    excess.

    The excess of a problem is its time over the best candidate's. Raises ValueError for several buckets.
    """
    if len({problem.bucket for problem in problems}) != 1:
        raise ValueError(f"problems of several buckets: {sorted({problem.bucket for problem in problems})}")
    shared = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    times: dict[DecodeConfig, list[float]] = {}
    for problem in problems:
        run = DecodeRun(problem, device)
        for config in decode_candidates(problem, shared):
            times.setdefault(config, []).append(_seconds_or_infinite(run, config))
        del run
        torch.cuda.empty_cache()
    best_of = [min(column) for column in zip(*times.values(), strict=True)]

    def excess(config: DecodeConfig) -> float:
        pairs = zip(times[config], best_of, strict=True)
        return float(sum(seconds / best for seconds, best in pairs))

    chosen, _ = choose(times, excess)
    cache.put(decode_key(problems[0], torch.cuda.get_device_name(device)), asdict(chosen), times[chosen][0])
    for config in sorted(times, key=excess)[:12]:
        sys.stdout.write(f"{config} {' '.join(f'{seconds * 1e6:.1f}' for seconds in times[config])} us\n")
    return chosen


def compile_decode(problem: DecodeProblem, device: torch.device | str, part: int, parts: int) -> None:
    """Compile every `parts`-th candidate into triton's cache on disk; several processes share the work so."""
    shared = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    # Small, but alike in what launches are specialised for: sizes and strides that 16 divides.
    run = DecodeRun(replace(problem, rows=2, length=4096), device)
    for config in decode_candidates(problem, shared)[part::parts]:
        with suppress(*DOES_NOT_RUN):
            run.prepare(config)()


def _seconds_or_infinite(run: DecodeRun, config: DecodeConfig) -> float:
    try:
        return run.seconds(config)
    except DOES_NOT_RUN:
        return math.inf


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure how decode attention runs best on this GPU, and keep it."
    )
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("QUERY", "KV"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-tokens", type=int, nargs="+", default=[16])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float8_e4m3fn"])
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=["8x32768", "1x131072"], metavar="ROWSxLENGTH")
    parser.add_argument("--file", type=Path, default=default_path())
    parser.add_argument("--compile", type=int, nargs=2, metavar=("PART", "PARTS"), help="compile only")
    options = parser.parse_args()
    heads: tuple[int, int] = tuple(options.heads)
    shapes = [(int(rows), int(length)) for rows, length in (shape.split("x") for shape in options.shapes)]
    cache = TuningCache(options.file)
    for block_tokens in options.block_tokens:
        dtype = getattr(torch, options.dtype)
        problems = [
            DecodeProblem(*heads, options.head_dim, block_tokens, dtype, options.queries, rows, length)
            for rows, length in shapes
        ]
        if options.compile:
            compile_decode(problems[0], "cuda", *options.compile)
            continue
        config = tune_decode(problems, cache, "cuda")
        sys.stdout.write(f"{problems[0].bucket}: {config}\n")


if __name__ == "__main__":
    main()
