"""Which products of few rows `skinny_linear` takes on this card, and how it runs them best: known results,
and the command that measures them.

    python -m flume_kernels.gpu.linear_tuning --rows 8 32 --hidden 4096 --query 4096 --kv 2048 --inner 14336

Measured against the plain way, torch's product with the kernels for norm and gate beside it. Where nothing is
known the plain way is taken, so a node's start never measures.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from flume_kernels.gpu import skinny_linear as skinny
from flume_kernels.gpu.rms_norm import rms_norm
from flume_kernels.gpu.silu_mul import silu_mul
from flume_kernels.gpu.skinny_linear import MAX_ROWS, SkinnyConfig, SplitMemory, skinny_linear, tile_rows
from flume_kernels.gpu.timing import graph_seconds
from flume_kernels.gpu.tuning import Key, TuningCache, choose, default_path, kernel_hash

DOES_NOT_RUN = (
    triton.runtime.errors.OutOfResources,
    triton.runtime.errors.PTXASError,
    torch.cuda.OutOfMemoryError,
)
LINEAR_KERNELS = (skinny._skinny_kernel, skinny._fetch, skinny._product, skinny._turned)
EPS = 1e-5
TOLERANCE = 2e-2  # of a bf16 result against float32, relative to the largest
OTHER_SHARED_BYTES = 2048  # reductions and what the system keeps
TILES = (  # block_n, block_k, warps, slices
    (16, 256, 1, 1), (16, 512, 4, 4), (32, 128, 1, 1), (32, 256, 2, 1), (32, 256, 4, 4), (32, 512, 4, 4),
    (64, 64, 4, 1), (64, 128, 4, 1), (64, 256, 4, 1), (64, 256, 4, 4), (128, 64, 4, 1), (128, 128, 4, 1),
    (128, 128, 8, 1), (256, 64, 8, 1),
)  # fmt: skip


class Fusion(StrEnum):
    """What one launch does."""

    NORM = "norm"  # the product of norm(x)
    GATE = "gate"  # that, and silu(a) · b of its halves
    ADD = "add"  # the product, added to out


@dataclass(frozen=True, slots=True)
class LinearProblem:
    """What the kernel is tuned for; `outputs` are the columns of the result."""

    rows: int
    outputs: int
    inner: int
    dtype: torch.dtype
    fusion: Fusion

    @property
    def products(self) -> int:
        """Rows of the weight."""
        return 2 * self.outputs if self.fusion is Fusion.GATE else self.outputs

    @property
    def weight_bytes(self) -> int:
        return self.products * self.inner * self.dtype.itemsize

    @property
    def bucket(self) -> str:
        """Names the fields a configuration depends on."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"linear {self.fusion} {self.products}x{self.inner} {dtype} rows{tile_rows(self.rows)}"


def model_problems(
    rows: int, hidden: int, query: int, kv: int, inner: int, vocabulary: int, dtype: torch.dtype
) -> dict[str, LinearProblem]:
    """The products of a model's layer and its head, as a decode step asks for them; kv counts K and V."""
    return {
        "Q": LinearProblem(rows, query, hidden, dtype, Fusion.NORM),
        "K and V": LinearProblem(rows, kv, hidden, dtype, Fusion.NORM),
        "O": LinearProblem(rows, hidden, query, dtype, Fusion.ADD),
        "gate and up": LinearProblem(rows, inner, hidden, dtype, Fusion.GATE),
        "down": LinearProblem(rows, hidden, inner, dtype, Fusion.ADD),
        "head": LinearProblem(rows, vocabulary, hidden, dtype, Fusion.NORM),
    }


def linear_key(problem: LinearProblem, gpu: str) -> Key:
    return Key(gpu, triton.__version__, kernel_hash(LINEAR_KERNELS), problem.bucket)


def can_take(problem: LinearProblem) -> bool:
    """Whether the kernel computes this. x ∘ w, not yet divided by its root mean square, could leave
    float16."""
    fits = problem.fusion is Fusion.ADD or problem.dtype is not torch.float16
    return 0 < problem.rows <= MAX_ROWS and fits


def known_config(problem: LinearProblem, cache: TuningCache, gpu: str) -> tuple[SkinnyConfig, bool] | None:
    """(the best configuration, whether it beat the plain way) as measured; None where nothing was."""
    found = cache.get(linear_key(problem, gpu)) if can_take(problem) else None
    if found is None:
        return None
    faster = bool(found.pop("faster"))
    return SkinnyConfig(**found), faster


class LinearChoice:
    """The configuration for a problem on a device, None for the plain way. Looks each bucket up once."""

    def __init__(self, cache: TuningCache) -> None:
        self._cache = cache
        self._chosen: dict[str, SkinnyConfig | None] = {}

    def __call__(self, problem: LinearProblem, device: torch.device) -> SkinnyConfig | None:
        if device.type != "cuda" or not can_take(problem):
            return None
        bucket = f"{device} {problem.bucket}"
        if bucket not in self._chosen:
            known = known_config(problem, self._cache, torch.cuda.get_device_name(device))
            self._chosen[bucket] = known[0] if known is not None and known[1] else None
        return self._chosen[bucket]


@dataclass(frozen=True, slots=True)
class Chip:
    """What candidates depend on."""

    processors: int
    shared_bytes: int  # of one multiprocessor
    capability: int  # major

    @classmethod
    def of(cls, device: torch.device | str) -> Chip:
        found = torch.cuda.get_device_properties(device)
        return cls(found.multi_processor_count, found.shared_memory_per_multiprocessor, found.major)


def linear_candidates(problem: LinearProblem, chip: Chip) -> list[SkinnyConfig]:
    """Configurations worth trying: some 64 to 160 KiB on their way into each multiprocessor, which holds 1 to
    4 programs at once, and as many programs as fill the chip once, where the matrix has rows for fewer."""
    found: dict[SkinnyConfig, None] = {}
    for (block_n, block_k, warps, slices), programs in itertools.product(TILES, (1, 2, 3, 4)):
        matrices = 2 if problem.fusion is Fusion.GATE else 1
        rows = tile_rows(problem.rows)
        stage_bytes = (matrices * block_n + rows) * block_k * problem.dtype.itemsize
        if rows * max(matrices * block_n * slices, block_k) > 64 * 32 * warps:  # float32 a thread
            continue
        tiles = -(-problem.outputs // block_n)
        blocks = -(-problem.inner // block_k)
        split = min(max(programs * chip.processors // tiles, 1), 16, max(blocks // 2, 1))
        for held in (64 << 10, 96 << 10, 160 << 10):
            stages = min(max(round(held / (programs * stage_bytes)), 1), 8) + 1
            if programs * (stages * stage_bytes + OTHER_SHARED_BYTES) > chip.shared_bytes:
                continue
            for early in (1, 0) if chip.capability >= 9 else (0,):
                found[SkinnyConfig(block_n, block_k, split, stages, warps, slices, early)] = None
    return list(found)


class LinearRun:
    """Memory for one problem: so many matrices, used in turn, that none is in L2 when its turn comes."""

    def __init__(
        self, problem: LinearProblem, device: torch.device | str, matrices: int | None = None
    ) -> None:
        self.problem = problem
        if matrices is None:
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            matrices = max(2, math.ceil(4 * l2_bytes / problem.weight_bytes))

        def empty(*size: int) -> Tensor:
            return torch.empty(size, dtype=problem.dtype, device=device)

        deviation = problem.inner**-0.5
        self.weights = [empty(problem.products, problem.inner).normal_(0, deviation) for _ in range(matrices)]
        self.x = empty(problem.rows, problem.inner).normal_()
        self.norm = empty(problem.inner).normal_(1, 0.2)
        self.out = empty(problem.rows, problem.outputs).zero_()
        self._memory = SplitMemory()

    def product(self, weight: Tensor, config: SkinnyConfig | None) -> Tensor:
        """One product by our kernel, or the plain way for None: its result, which may be `out`."""
        if config is None:
            return self._plain(weight)
        fusion = self.problem.fusion
        skinny_linear(
            self.x, weight, self.out, config, self._memory,
            norm=None if fusion is Fusion.ADD else self.norm, eps=EPS,
            gated=fusion is Fusion.GATE, add=fusion is Fusion.ADD,
        )  # fmt: skip
        return self.out

    def _plain(self, weight: Tensor) -> Tensor:
        fusion = self.problem.fusion
        if fusion is Fusion.ADD:
            return self.out.addmm_(self.x, weight.T)
        normed = torch.empty_like(self.x)
        rms_norm(self.x, self.norm, normed, EPS)
        y = F.linear(normed, weight)
        if fusion is Fusion.GATE:
            silu_mul(y, self.out)
            return self.out
        return y

    def exact(self) -> Tensor:
        """The first matrix's product in float32."""
        fusion, x = self.problem.fusion, self.x.float()
        if fusion is not Fusion.ADD:
            x = F.rms_norm(x, (self.problem.inner,), self.norm.float(), EPS)
        y = F.linear(x, self.weights[0].float())
        if fusion is Fusion.GATE:
            gate, up = y.chunk(2, -1)
            y = F.silu(gate) * up
        return y

    def is_right(self, config: SkinnyConfig | None, want: Tensor) -> bool:
        """Whether two runs agree bit for bit, and with `exact`."""
        results = []
        for _ in range(2):
            self.out.zero_()
            results.append(self.product(self.weights[0], config).clone())
        error = ((results[0].float() - want).abs().max() / want.abs().max()).item()
        return torch.equal(*results) and error <= TOLERANCE

    def seconds(self, config: SkinnyConfig | None) -> float:
        return self.seconds_of(lambda weight: self.product(weight, config))

    def seconds_of(self, way: Callable[[Tensor], object]) -> float:
        """The time of one product by `way`, given the matrices in turn."""
        turns = itertools.cycle(self.weights)
        self.out.zero_()
        count = len(self.weights)
        return graph_seconds(lambda: way(next(turns)), calls=count * math.ceil(8 / count))


def tune_linear(
    problem: LinearProblem, cache: TuningCache, device: torch.device | str, chip: Chip | None = None
) -> tuple[float, float]:
    """Measure every candidate and the plain way, keep what was best: seconds (ours, plain).

    Raises ValueError for a problem that the kernel does not take, RuntimeError when no candidate runs.
    """
    if not can_take(problem):
        raise ValueError(f"not one that skinny_linear takes: {problem}")
    run = LinearRun(problem, device)
    want = run.exact()
    times: dict[SkinnyConfig, float] = {}

    def measure(config: SkinnyConfig) -> float:
        times[config] = _seconds_or_infinite(run, config, want)
        return times[config]

    chosen, seconds = choose(linear_candidates(problem, chip or Chip.of(device)), measure)
    if math.isinf(seconds):
        raise RuntimeError(f"no candidate computes {problem.bucket} on this device")
    plain = run.seconds(None)
    numbers = asdict(chosen) | {"faster": int(seconds < plain)}
    cache.put(linear_key(problem, torch.cuda.get_device_name(device)), numbers, seconds)
    for config in sorted(times, key=lambda config: times[config])[:6]:
        sys.stdout.write(f"{config} {times[config] * 1e6:.1f} us\n")
    return seconds, plain


def _seconds_or_infinite(run: LinearRun, config: SkinnyConfig, want: Tensor) -> float:
    try:
        if run.is_right(config, want):
            return run.seconds(config)
    except DOES_NOT_RUN:
        return math.inf
    sys.stdout.write(f"wrong, or not the same twice: {config}\n")
    return math.inf


def compile_linear(problem: LinearProblem, chip: Chip, part: int, parts: int) -> None:
    """Compile every `parts`-th candidate into triton's cache on disk; several processes share the work so."""
    # Fewer outputs: what launches are specialised for is only that 16 divides them.
    run = LinearRun(replace(problem, outputs=512), "cuda", matrices=1)
    for config in linear_candidates(problem, chip)[part::parts]:
        with suppress(*DOES_NOT_RUN):
            run.product(run.weights[0], config)


def _problems(options: argparse.Namespace) -> Iterable[LinearProblem]:
    for rows in options.rows:
        sizes = (options.hidden, options.query, options.kv, options.inner, options.vocabulary)
        problems = model_problems(rows, *sizes, getattr(torch, options.dtype))
        yield from {problem.bucket: problem for problem in problems.values()}.values()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure how products of few rows run best on this GPU, and keep it."
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32, 64], help="buckets of a batch")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--query", type=int, default=4096, help="outputs of Q")
    parser.add_argument("--kv", type=int, default=2048, help="outputs of K and V together")
    parser.add_argument("--inner", type=int, default=14336, help="width of the feed-forward block")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--file", type=Path, default=default_path())
    parser.add_argument("--no-early", action="store_true", help="no launch begins before the one before ends")
    parser.add_argument("--compile", type=int, nargs=2, metavar=("PART", "PARTS"), help="compile only")
    return parser.parse_args()


def main() -> None:
    options = _arguments()
    cache, chip = TuningCache(options.file), Chip.of("cuda")
    if options.no_early:
        chip = replace(chip, capability=8)
    torch.manual_seed(0)
    for problem in _problems(options):
        if options.compile:
            compile_linear(problem, chip, *options.compile)
            continue
        ours, plain = tune_linear(problem, cache, "cuda", chip)
        rate = problem.weight_bytes / ours / 1e12
        sys.stdout.write(
            f"{problem.bucket}: {ours * 1e6:.1f} us, {rate:.2f} TB/s; plain {plain * 1e6:.1f} us\n"
        )
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
