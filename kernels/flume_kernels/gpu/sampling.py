"""Choose the next token of each row from its logits.

Greedy rows (temperature 0) take the largest logit, the first of equals. Others draw by the Gumbel trick:
the largest of logit / temperature + noise among the tokens kept by top-k, then top-p. The noise is Philox
4×32-10 of (seed, position, token): a row's draw depends on its own logits, seed and position and on nothing
else in the batch. Which tokens are kept
is exact and needs no sort: the edge is found by bisection over the ordered bits of float32, ties at the
edge all kept. `reference.sample` is the definition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GREEDY_CHUNK = 8192  # tokens one program looks at: 16 programs a row at 128K
LANES = 1024  # part of the definition: which word of which counter a token gets depends on it


@triton.jit
def _ordered(x):
    # Float32 as integers in the same order: flip the lower bits of negative numbers.
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _logits(row_ptr, base, vocabulary, LANES: tl.constexpr):
    tokens = base + tl.arange(0, LANES)
    # Adding 0 turns −0 into 0, which the order by bits would tell apart.
    return tl.load(row_ptr + tokens, mask=tokens < vocabulary, other=-float("inf")).to(tl.float32) + 0.0


@triton.jit
def _weight_from(row_ptr, edge, top, inverse, vocabulary, COUNT: tl.constexpr, LANES: tl.constexpr):
    # Of tokens whose ordered logit is at least `edge`: how many, or their weight.
    total = tl.zeros([LANES], tl.float32)
    for base in range(0, vocabulary, LANES):
        x = _logits(row_ptr, base, vocabulary, LANES)
        order = _ordered(x)
        inside = (base + tl.arange(0, LANES) < vocabulary) & (order >= edge)
        if COUNT:
            total += tl.where(inside, 1.0, 0.0)
        else:
            total += tl.where(inside, tl.exp((x - top) * inverse), 0.0)
    return tl.sum(total, 0)


@triton.jit
def _edge(row_ptr, low, high, need, top, inverse, vocabulary, COUNT: tl.constexpr, LANES: tl.constexpr):
    # The largest edge in [low, high] from which on there is `need`; int64, as the span overflows int32.
    while low < high:
        middle = low + (high - low + 1) // 2
        reached = _weight_from(row_ptr, middle.to(tl.int32), top, inverse, vocabulary, COUNT, LANES)
        low = tl.where(reached >= need, middle, low)
        high = tl.where(reached >= need, high, middle - 1)
    return low.to(tl.int32)


@triton.jit
def _uniform(word):
    # 23 bits and a half: never 0, never 1, exact in float32.
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _chunk_max_kernel(logits_ptr, best_ptr, row_stride, vocabulary, CHUNK: tl.constexpr, LANES: tl.constexpr):
    # A logit's order above, the token counted down below: the largest word is the first of the largest.
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    best = tl.full([LANES], -(1 << 63), tl.int64)
    for base in range(chunk * CHUNK, chunk * CHUNK + CHUNK, LANES):
        tokens = base + tl.arange(0, LANES)
        order = _ordered(_logits(logits_ptr + row * row_stride, base, vocabulary, LANES))
        word = (order.to(tl.int64) << 32) | (0x7FFFFFFF - tokens).to(tl.int64)
        best = tl.maximum(best, tl.where(tokens < vocabulary, word, -(1 << 63)))
    tl.store(best_ptr + row * tl.num_programs(1) + chunk, tl.max(best, 0))


@triton.jit
def _chunks_max_kernel(best_ptr, tokens_ptr, chunks, CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, CHUNKS)
    word = tl.max(tl.load(best_ptr + row * chunks + lanes, mask=lanes < chunks, other=-(1 << 63)), 0)
    tl.store(tokens_ptr + row, 0x7FFFFFFF - (word & 0xFFFFFFFF))


@triton.jit
def _sample_kernel(
    logits_ptr,  # [rows, vocabulary]
    temperatures_ptr,  # [rows] fp32
    top_k_ptr,  # [rows] int32, 0: all
    top_p_ptr,  # [rows] fp32
    seeds_ptr,  # [rows] int64
    positions_ptr,  # [rows] int64
    tokens_ptr,  # [rows] int64
    row_stride,
    vocabulary,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    lanes = tl.arange(0, LANES)
    temperature = tl.load(temperatures_ptr + row)
    greedy = temperature == 0.0
    inverse = 1.0 / tl.where(greedy, 1.0, temperature)

    highest = tl.full([LANES], -float("inf"), tl.float32)
    lowest = tl.full([LANES], float("inf"), tl.float32)
    for base in range(0, vocabulary, LANES):
        x = _logits(row_ptr, base, vocabulary, LANES)
        highest = tl.maximum(highest, x)
        lowest = tl.minimum(lowest, tl.where(base + lanes < vocabulary, x, float("inf")))
    top = tl.max(highest, 0)
    high = _ordered(top).to(tl.int64)
    low = _ordered(tl.min(lowest, 0)).to(tl.int64)

    k = tl.load(top_k_ptr + row)
    p = tl.load(top_p_ptr + row)
    floor = low.to(tl.int32)
    if (not greedy) & (k > 0) & (k < vocabulary):
        floor = _edge(row_ptr, low, high, k.to(tl.float32), top, inverse, vocabulary, True, LANES)
    if (not greedy) & (p < 1.0):
        total = _weight_from(row_ptr, floor, top, inverse, vocabulary, False, LANES)
        floor = _edge(row_ptr, floor.to(tl.int64), high, p * total, top, inverse, vocabulary, False, LANES)

    seed = tl.load(seeds_ptr + row)
    position = tl.load(positions_ptr + row)
    best = tl.full([LANES], -float("inf"), tl.float32)
    best_token = tl.zeros([LANES], tl.int32)
    for base in range(0, vocabulary, 4 * LANES):
        counter = (base + lanes).to(tl.uint32)
        zero = tl.zeros([LANES], tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, counter, zero + position.to(tl.uint32), zero, zero)
        for quarter in tl.static_range(4):
            word = w0 if quarter == 0 else (w1 if quarter == 1 else (w2 if quarter == 2 else w3))
            at = base + quarter * LANES
            x = _logits(row_ptr, at, vocabulary, LANES)
            noise = tl.where(greedy, 0.0, -tl.log(-tl.log(_uniform(word))))
            allowed = (at + lanes < vocabulary) & (_ordered(x) >= floor)
            value = tl.where(allowed, x * inverse + noise, -float("inf"))
            better = value > best
            best = tl.where(better, value, best)
            best_token = tl.where(better, at + lanes, best_token)
    winner = tl.max(best, 0)
    first = tl.min(tl.where(best == winner, best_token, 2147483647), 0)
    tl.store(tokens_ptr + row, first.to(tl.int64))


def greedy(logits: Tensor, tokens: Tensor, workspace: Tensor) -> None:
    """The largest logit of each row, the first of equals; queues two kernels on the current stream.

    logits [rows, vocabulary] as in `sample`; tokens int64 [rows], written; workspace int64 of at least
    `greedy_workspace_size(rows, vocabulary)` elements. Raises ValueError when these do not fit.
    """
    rows, vocabulary = logits.shape
    size = greedy_workspace_size(rows, vocabulary)
    if tokens.shape != (rows,) or {tokens.dtype, workspace.dtype} != {torch.int64} or logits.stride(1) != 1:
        raise ValueError(f"tokens and workspace must be int64 and rows contiguous, tokens [{rows}]")
    if workspace.numel() < size:
        raise ValueError(f"workspace of {workspace.numel()} elements, {size} needed")
    if rows:
        chunks = triton.cdiv(vocabulary, GREEDY_CHUNK)
        _chunk_max_kernel[(rows, chunks)](
            logits, workspace, logits.stride(0), vocabulary, CHUNK=GREEDY_CHUNK, LANES=LANES, num_warps=4
        )
        _chunks_max_kernel[(rows,)](
            workspace, tokens, chunks, CHUNKS=triton.next_power_of_2(chunks), num_warps=1
        )


def greedy_workspace_size(rows: int, vocabulary: int) -> int:
    """Elements `greedy` needs to work in."""
    return rows * -(-vocabulary // GREEDY_CHUNK)


def sample(
    logits: Tensor,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    tokens: Tensor,
) -> None:
    """Choose one token per row; queues one kernel on the current stream.

    Args:
        logits: [rows, vocabulary], bf16, fp16 or fp32, rows contiguous, no nan.
        temperatures: float32 [rows], 0 for greedy.
        top_k: int32 [rows], 0 for all; top_p: float32 [rows], 1 for all.
        seeds: int64 [rows]; positions: int64 [rows], that of the drawn token in its sequence (its lower 32
            bits count).
        tokens: int64 [rows], written.

    Raises ValueError when shapes or dtypes do not fit.
    """
    rows, vocabulary = logits.shape
    dtypes = (torch.float32, torch.int32, torch.float32, torch.int64, torch.int64, torch.int64)
    words = (temperatures, top_k, top_p, seeds, positions, tokens)
    for tensor, dtype in zip(words, dtypes, strict=True):
        if tensor.shape != (rows,) or tensor.dtype is not dtype or not tensor.is_contiguous():
            raise ValueError(
                f"expected contiguous {dtype} [{rows}], got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if logits.stride(1) != 1:
        raise ValueError("rows of logits must be contiguous")
    if rows:
        _sample_kernel[(rows,)](
            logits, temperatures, top_k, top_p, seeds, positions, tokens, logits.stride(0), vocabulary,
            LANES=LANES, num_warps=8,
        )  # fmt: skip
