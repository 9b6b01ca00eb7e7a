"""y = x · Wᵀ for few rows of x: W is read once, as fast as memory gives it, and all else hides behind that.

    out  = x · Wᵀ + b                               a projection
    out  = (x ∘ w · Wᵀ) / √(mean(x²) + eps) + b      of the norm of x: the mean is taken on the way
    out  = silu(g) · u,  g, u = the halves of that   the gate's rows of W first, then up's
    out += …                                        the residual stream, in place

Any of them together but the last two. `reference.skinny_linear` is the definition. Products are summed in
float32, and what is done to the sums is float32 too: out is rounded once, also where it is added to. x ∘ w is
rounded to x's dtype before the product, where a norm on its own rounds its result: as large an error.

W's rows are the tall side of the product, [BLOCK_N, BLOCK_K] · [BLOCK_K, ROWS]: tensor cores take 16 or 64 of
those but as few as 8 columns, so nothing is computed for rows that are not there. Where W has too few rows to
fill the chip, a program takes few of them and its warps slices of K; or programs share K out: each leaves its
float32 sums in memory, and the last to arrive adds them in the order of K, so that the result does not depend
on who was last. Their number is taken by an integer atomic; there is none on floats.

A launch may begin before the one it follows has ended (`early`, compute capability 9): it fetches the first
tiles of W into L2, which nobody writes, and then waits. Such a launch must follow kernels on the same stream
that end only when all before them have; those of this module and ordinary launches do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

MAX_ROWS = 64
MIN_ROWS = 8  # columns that a tensor core computes at least


@triton.jit
def _fetch(weight_at, COLUMNS: tl.constexpr, LINE: tl.constexpr):
    # Whole cache lines from [BLOCK_N, 1] pointers on, without waiting for them.
    for line in tl.static_range(0, COLUMNS, LINE):
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // dummy $0", "=r,l", [weight_at + line], tl.int32, False, 1
        )


@triton.jit
def _product(weight, x_turned, acc, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    # The interpreter multiplies the bits of bf16 as integers, so it is given float32 of the same values.
    if WIDE:
        weight = weight.to(tl.float32)
        x_turned = x_turned.to(tl.float32)
    return tl.dot(weight, x_turned, acc, input_precision=PRECISION)


@triton.jit
def _turned(x, SLICES: tl.constexpr):
    return tl.trans(x) if SLICES == 1 else tl.permute(x, (0, 2, 1))


@triton.jit(do_not_specialize=["rows"])
def _skinny_kernel(
    x_ptr,  # [rows, inner]
    weight_ptr,  # [outputs, inner]; [2 · outputs, inner] when GATED
    bias_ptr,  # [outputs] or [2 · outputs], read when HAS_BIAS
    norm_ptr,  # [inner], read when NORM
    out_ptr,  # [rows, outputs], read when ADD
    partial_ptr,  # fp32 [tiles, SPLIT, PARTIAL], when SPLIT > 1: sums [BLOCK_N, ROWS], up's, squares [ROWS]
    arrivals_ptr,  # int32 [tiles], all 0 before and after, when SPLIT > 1
    rows,
    outputs,
    inner,
    x_stride,
    weight_stride,
    out_stride,
    eps,
    ROWS: tl.constexpr,  # of a tile: a power of two >= rows
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides inner
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
    PARTIAL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    part = tl.program_id(1)
    output = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # Outputs past the end are computed as the last one is, and not stored: no mask on W for their sake.
    n = tl.minimum(output, outputs - 1)
    row = tl.arange(0, ROWS)
    # [1, BLOCK_K], or [SLICES, 1, BLOCK_K / SLICES]: one slice for each warp.
    WIDTH: tl.constexpr = BLOCK_K // SLICES
    SUMS: tl.constexpr = (BLOCK_N, ROWS) if SLICES == 1 else (SLICES, BLOCK_N, ROWS)
    X: tl.constexpr = (ROWS, BLOCK_K) if SLICES == 1 else (SLICES, ROWS, WIDTH)
    k = tl.arange(0, BLOCK_K)[None, :]
    if SLICES > 1:
        # Not k in another shape: the compiler would not see that it is contiguous.
        k = (tl.arange(0, SLICES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])[:, None, :]
    blocks = tl.cdiv(inner, BLOCK_K)
    first = part * blocks // SPLIT
    last = (part + 1) * blocks // SPLIT
    given = row < rows

    weight_rows = weight_ptr + n.to(tl.int64) * weight_stride
    up_offset = tl.full([], outputs, tl.int64) * weight_stride
    if EARLY:
        cuda.gdc_launch_dependents()
        LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth  # 128 bytes
        _fetch(weight_rows + first * BLOCK_K, (STAGES - 1) * BLOCK_K, LINE)
        if GATED:
            _fetch(weight_rows + up_offset + first * BLOCK_K, (STAGES - 1) * BLOCK_K, LINE)
        cuda.gdc_wait()

    weight_at = weight_rows[:, None] + (first * BLOCK_K + k)
    x_at = (x_ptr + row.to(tl.int64) * x_stride)[:, None] + (first * BLOCK_K + k)
    norm_at = norm_ptr + first * BLOCK_K + k
    acc = tl.zeros(SUMS, tl.float32)
    up = tl.zeros(SUMS, tl.float32)
    squares = tl.zeros(X, tl.float32)
    if NORM:
        next_norm = tl.load(norm_at, mask=(first < last) & (first * BLOCK_K + k < inner), other=0.0)
    for block in tl.range(first, last, num_stages=STAGES):
        if EVEN_K:
            weight = tl.load(weight_at)
            x = tl.load(x_at, mask=given[:, None], other=0.0)
        else:
            held = block * BLOCK_K + k < inner
            weight = tl.load(weight_at, mask=held, other=0.0)
            x = tl.load(x_at, mask=given[:, None] & held, other=0.0)
        if NORM:
            # One block ahead: too small a load for the compiler to do so.
            norm = next_norm
            norm_at += BLOCK_K
            if EVEN_K:
                next_norm = tl.load(norm_at, mask=block + 1 < last, other=0.0)
            else:
                ahead = (block + 1) * BLOCK_K + k
                next_norm = tl.load(norm_at, mask=(block + 1 < last) & (ahead < inner), other=0.0)
            wide = x.to(tl.float32)
            squares += wide * wide
            x = (wide * norm.to(tl.float32)).to(x.dtype)
        turned = _turned(x, SLICES)
        acc = _product(weight, turned, acc, WIDE, PRECISION)
        if GATED:
            if EVEN_K:
                weight = tl.load(weight_at + up_offset)
            else:
                weight = tl.load(weight_at + up_offset, mask=held, other=0.0)
            up = _product(weight, turned, up, WIDE, PRECISION)
        weight_at += BLOCK_K
        x_at += BLOCK_K
    if SLICES > 1:
        acc = tl.sum(acc, 0)
        up = tl.sum(up, 0)
        squares = tl.sum(squares, 0)
    square = tl.sum(squares, 1)

    if SPLIT > 1:
        CELLS: tl.constexpr = BLOCK_N * ROWS
        cell = tl.arange(0, BLOCK_N)[:, None] * ROWS + row[None, :]
        partials = partial_ptr + tile.to(tl.int64) * SPLIT * PARTIAL
        mine = partials + part * PARTIAL
        tl.store(mine + cell, acc)
        if GATED:
            tl.store(mine + CELLS + cell, up)
        if NORM:
            tl.store(mine + (PARTIAL - ROWS) + row, square)
        tl.debug_barrier()  # all threads' sums before the one thread that counts
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu") != SPLIT - 1:
            return
        tl.store(arrivals_ptr + tile, 0)
        acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
        up = tl.zeros([BLOCK_N, ROWS], tl.float32)
        square = tl.zeros([ROWS], tl.float32)
        for other in tl.static_range(SPLIT):
            at = partials + other * PARTIAL
            acc += tl.load(at + cell, cache_modifier=".cg")
            if GATED:
                up += tl.load(at + CELLS + cell, cache_modifier=".cg")
            if NORM:
                square += tl.load(at + (PARTIAL - ROWS) + row, cache_modifier=".cg")

    if NORM:
        scale = 1.0 / tl.sqrt(square / inner + eps)
        acc *= scale[None, :]
        up *= scale[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    if GATED:
        if HAS_BIAS:
            up += tl.load(bias_ptr + outputs + n).to(tl.float32)[:, None]
        # The sigmoid of a very negative gate is 1 / (1 + inf) = 0, not nan.
        acc = acc / (1.0 + tl.exp(-acc)) * up
    out_at = out_ptr + row.to(tl.int64)[None, :] * out_stride + output[:, None]
    inside = given[None, :] & (output < outputs)[:, None]
    if ADD:
        acc += tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class SkinnyConfig:
    """How the kernel runs on one kind of card. What it computes depends on `split` and `block_k` only in the
    order of sums."""

    block_n: int = 64
    block_k: int = 128
    split: int = 1  # programs that share a tile's rows along K
    num_stages: int = 5
    num_warps: int = 4
    slices: int = 1  # 1, or num_warps: each warp takes a slice of block_k, and not rows of the tile
    early: int = 0  # 1: begins before the kernel before it has ended


def tile_rows(rows: int) -> int:
    """Rows of the tile that `rows` are computed in. Raises ValueError for more than `MAX_ROWS`."""
    if not 0 <= rows <= MAX_ROWS:
        raise ValueError(f"{rows} rows: at most {MAX_ROWS}")
    return max(MIN_ROWS, int(triton.next_power_of_2(rows)))


@dataclass(slots=True)
class SplitMemory:
    """Where programs that share a tile leave their sums: one for each stream, for good.

    It grows by more memory and gives none back, as launches may be captured.
    """

    _held: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def of(self, floats: int, tiles: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(float32 [at least floats], int32 zeros [at least tiles])."""
        for partial, arrivals in self._held:
            if len(partial) >= floats and len(arrivals) >= tiles:
                return partial, arrivals
        found = (
            torch.empty(triton.next_power_of_2(floats), dtype=torch.float32, device=device),
            torch.zeros(triton.next_power_of_2(tiles), dtype=torch.int32, device=device),
        )
        self._held.append(found)
        return found


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    config: SkinnyConfig,
    memory: SplitMemory,
    *,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add: bool = False,
) -> None:
    """Queues one kernel on the current stream.

    Args:
        x: [rows, inner], at most `MAX_ROWS`, contiguous rows at any stride.
        weight: [outputs, inner] of x's dtype; [2 · outputs, inner] when gated. Rows like x's.
        out: [rows, outputs] of any float dtype; written, or added to.
        memory: of this stream.
        bias: [outputs], or [2 · outputs].
        norm: [inner]: the product is that of norm(x), with `eps`.

    Raises ValueError when the arguments do not fit together.
    """
    rows, inner = x.shape
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    _check(x, weight, out, bias, norm, gated, add)
    if not rows:
        return
    padded = tile_rows(rows)
    tiles = triton.cdiv(outputs, config.block_n)
    partial = ((2 if gated else 1) * config.block_n + 1) * padded
    sums = arrivals = x  # not touched
    if config.split > 1:
        sums, arrivals = memory.of(tiles * config.split * partial, tiles, x.device)
    _skinny_kernel[(tiles, config.split)](
        x, weight, bias if bias is not None else x, norm if norm is not None else x, out, sums, arrivals,
        rows, outputs, inner, x.stride(0), weight.stride(0), out.stride(0), eps,
        ROWS=padded, BLOCK_N=config.block_n, BLOCK_K=config.block_k, SLICES=config.slices, SPLIT=config.split,
        STAGES=config.num_stages, EVEN_K=inner % config.block_k == 0, NORM=norm is not None, GATED=gated,
        ADD=add, HAS_BIAS=bias is not None, EARLY=bool(config.early), PARTIAL=partial,
        WIDE=triton.knobs.runtime.interpret,
        PRECISION="ieee" if x.dtype is torch.float32 else "tf32",
        num_warps=config.num_warps, launch_pdl=bool(config.early),
    )  # fmt: skip


def _check(
    x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None, norm: Tensor | None, gated: bool, add: bool
) -> None:
    rows, inner = x.shape
    products = weight.shape[0]
    outputs = products // 2 if gated else products
    if gated and (add or products % 2):
        raise ValueError("a gated product has two halves, and is not added to anything")
    wanted = {
        "weight": (weight.shape, (products, inner)),
        "weight's dtype": (weight.dtype, x.dtype),
        "out": (out.shape, (rows, outputs)),
        "last strides": ((x.stride(1), weight.stride(1), out.stride(1)), (1, 1, 1)),
    }
    if bias is not None:
        wanted["bias"] = ((*bias.shape, bias.stride(0)), (products, 1))
    if norm is not None:
        wanted["norm"] = ((*norm.shape, norm.stride(0)), (inner, 1))
    for name, (given, expected) in wanted.items():
        if given != expected:
            raise ValueError(f"{name}: {given}, expected {expected}")
