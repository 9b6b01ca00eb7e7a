"""What the host must know of each row of logits to choose its token, so that it need not see them all.

Per row: the largest logits in order, the sums that make probabilities of them, and the token that a draw from
all of them gives. That is the largest of logit / temperature + noise; the noise is a function of (key, token
id) alone, the one of `flume_weight.sampling.noise`. It is computed here in float32 with the device's own
logarithm, so the draw comes with its margin over the next token: where that is smaller than rounding can
explain, it proves nothing. `reference.shortlist` is the definition.

Two kernels: one program for each chunk of a row, then one for each row over what the chunks found. A row that
needs neither candidates nor a draw costs one reading of its logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flume_kernels.gpu.sampling import _ordered

CHUNK = 2048  # logits of one program: 63 programs a row at 128K
CHUNK_SUMS = 5  # largest, mass, scaled mass, best score, second best
SUMS = 3  # mass, scaled mass, margin
NOTHING = tl.constexpr(-(1 << 63))
LAST_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _mixed(x):
    # MurmurHash3's finaliser.
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    x ^= x >> 16
    return x


@triton.jit
def _gumbel(key, tokens):
    x = _mixed(tokens.to(tl.uint32) * 0x9E3779B1 + key.to(tl.uint32))
    x = _mixed(x ^ (key >> 32).to(tl.uint32))
    u = tl.minimum(
        tl.maximum(x.to(tl.float32) * 2.3283064365386963e-10, 1.1641532182693481e-10), 1 - 2.0**-24
    )
    # -log(1 - u): for a small u, which is what wins, 1 - u would lose it.
    series = u * (1.0 + u * (0.5 + u * (1 / 3 + u * 0.25)))
    return -tl.log(tl.where(u < 0.015625, series, -tl.log(1.0 - u)))


@triton.jit
def _word(x, tokens):
    # A logit's order above, the token counted down below: larger words come first, and first of equals.
    return (_ordered(x).to(tl.int64) << 32) | (0x7FFFFFFF - tokens).to(tl.int64)


@triton.jit
def _token_of(word):
    return (0x7FFFFFFF - (word & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def _logit_of(word):
    order = (word >> 32).to(tl.int32)
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def _finite(top):
    # What to subtract: of nothing but −∞ that is 0, as −∞ − −∞ is no number.
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _best_and_second(scores, tokens):
    best = tl.max(scores, 0)
    first = tl.min(tl.where(scores == best, tokens, LAST_TOKEN), 0)
    return best, first, tl.max(tl.where(tokens == first, -float("inf"), scores), 0)


@triton.jit
def _chunk_kernel(
    logits_ptr,  # [rows, vocabulary]
    keys_ptr,  # [rows] int64
    temperatures_ptr,  # [rows] fp64
    wants_ptr,  # [rows] int64
    words_ptr,  # [rows, chunks, COUNT] int64
    sums_ptr,  # [rows, CHUNK_SUMS, chunks] fp32
    drawn_ptr,  # [rows, chunks] int32
    row_stride,
    vocabulary,
    CHUNK: tl.constexpr,
    COUNT: tl.constexpr,
    SUMS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = tokens < vocabulary
    # Adding 0 turns −0 into 0, which the order by bits would tell apart.
    x = tl.load(logits_ptr + row * row_stride + tokens, mask=inside, other=-float("inf")).to(tl.float32) + 0.0
    sums = sums_ptr + row * SUMS * chunks + chunk
    words = words_ptr + (row * chunks + chunk) * COUNT

    top = tl.max(x, 0)
    below = x - _finite(top)
    tl.store(sums, top)
    tl.store(sums + chunks, tl.sum(tl.exp(below), 0))
    temperature = tl.load(temperatures_ptr + row).to(tl.float32)
    if temperature > 0:
        scaled = below / temperature
        scores = tl.where(inside, scaled + _gumbel(tl.load(keys_ptr + row), tokens), -float("inf"))
        best, first, second = _best_and_second(scores, tokens)
        tl.store(sums + 2 * chunks, tl.sum(tl.exp(scaled), 0))
        tl.store(sums + 3 * chunks, best)
        tl.store(sums + 4 * chunks, second)
        tl.store(drawn_ptr + row * chunks + chunk, first)

    word = tl.where(inside, _word(x, tokens), NOTHING)
    if tl.load(wants_ptr + row) != 0:
        tl.store(words + tl.arange(0, COUNT), tl.topk(word, COUNT))
    else:
        tl.store(words, tl.max(word, 0))


@triton.jit
def _row_kernel(
    logits_ptr,
    temperatures_ptr,
    wants_ptr,
    words_ptr,
    sums_ptr,
    drawn_ptr,
    tokens_ptr,  # [rows, 1 + COUNT] int32
    values_ptr,  # [rows, 1 + COUNT] fp32
    out_ptr,  # [rows, OUT] fp32
    row_stride,
    vocabulary,
    chunks,
    CHUNKS: tl.constexpr,
    COUNT: tl.constexpr,
    SUMS: tl.constexpr,
    OUT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, CHUNKS)
    there = lanes < chunks
    sums = sums_ptr + row * SUMS * chunks + lanes
    tokens, values = tokens_ptr + row * (1 + COUNT), values_ptr + row * (1 + COUNT)
    out = out_ptr + row * OUT

    tops = tl.load(sums, mask=there, other=-float("inf"))
    below = tops - _finite(tl.max(tops, 0))
    tl.store(out, tl.sum(tl.load(sums + chunks, mask=there, other=0.0) * tl.exp(below), 0))
    temperature = tl.load(temperatures_ptr + row).to(tl.float32)
    if temperature > 0:
        scaled = below / temperature
        mass = tl.load(sums + 2 * chunks, mask=there, other=0.0)
        bests = tl.load(sums + 3 * chunks, mask=there, other=-float("inf")) + scaled
        seconds = tl.load(sums + 4 * chunks, mask=there, other=-float("inf")) + scaled
        drawn = tl.load(drawn_ptr + row * chunks + lanes, mask=there, other=LAST_TOKEN)
        best, first, second = _best_and_second(bests, drawn)
        tl.store(tokens, first)
        tl.store(out + 1, tl.sum(mass * tl.exp(scaled), 0))
        tl.store(out + 2, best - tl.maximum(second, tl.max(seconds, 0)))
        # Masked, as a failed step's logits may be nan, and then no token is the best.
        logit = tl.load(logits_ptr + row * row_stride + first, mask=first < vocabulary, other=0.0)
        tl.store(values, logit.to(tl.float32))

    words = words_ptr + row * chunks * COUNT
    if tl.load(wants_ptr + row) != 0:
        every = tl.arange(0, CHUNKS * COUNT)
        found = tl.topk(tl.load(words + every, mask=every < chunks * COUNT, other=NOTHING), COUNT)
        tl.store(tokens + 1 + tl.arange(0, COUNT), _token_of(found))
        tl.store(values + 1 + tl.arange(0, COUNT), _logit_of(found))
    else:
        largest = tl.max(tl.load(words + lanes * COUNT, mask=there, other=NOTHING), 0)
        tl.store(tokens + 1, _token_of(largest))
        tl.store(values + 1, _logit_of(largest))


def shortlist(
    logits: Tensor,
    keys: Tensor,
    temperatures: Tensor,
    wants: Tensor,
    tokens: Tensor,
    values: Tensor,
    sums: Tensor,
    chunk: int = CHUNK,
) -> None:
    """What is to be known of each row; queues two kernels on the current stream.

    Args:
        logits: [rows, vocabulary], bf16, fp16 or fp32, rows contiguous, no nan.
        keys: int64 [rows], the 64 bits that name a draw.
        temperatures: float64 [rows], at least 1e-30, or 0 where nothing is drawn.
        wants: int64 [rows], not 0 where all candidates are wanted; elsewhere only the first is written.
        tokens: int32 [rows, 1 + count], written: the drawn token where one is drawn, then the candidates: the
            largest logits, the largest first, equal ones by the lower token.
        values: float32 [rows, 1 + count], written: their logits; −∞ or nan beyond the vocabulary.
        sums: float32 [rows, SUMS], written: the sum of exp(logit − largest); where a token is drawn that of
            exp((logit − largest) / temperature), and how far the drawn token was ahead of the next.
        chunk: logits of one program, a power of two of at least count.

    What is written may lie in host memory.

    Raises ValueError when shapes or dtypes do not fit, or count is no power of two up to `chunk`.
    """
    rows, vocabulary = logits.shape
    count = tokens.shape[1] - 1
    _check(rows, count, chunk, logits, (keys, temperatures, wants), tokens, values, sums)
    if not rows:
        return
    chunks = triton.cdiv(vocabulary, chunk)
    where = logits.device
    words = torch.empty(rows, chunks, count, dtype=torch.int64, device=where)
    parts = torch.empty(rows, CHUNK_SUMS, chunks, dtype=torch.float32, device=where)
    drawn = torch.empty(rows, chunks, dtype=torch.int32, device=where)
    _chunk_kernel[(rows, chunks)](
        logits, keys, temperatures, wants, words, parts, drawn, logits.stride(0), vocabulary,
        CHUNK=chunk, COUNT=count, SUMS=CHUNK_SUMS, num_warps=4,
    )  # fmt: skip
    width = triton.next_power_of_2(chunks)
    _row_kernel[(rows,)](
        logits, temperatures, wants, words, parts, drawn, tokens, values, sums, logits.stride(0), vocabulary,
        chunks, CHUNKS=width, COUNT=count, SUMS=CHUNK_SUMS, OUT=SUMS,
        num_warps=16 if width * count > 4096 else 8,
    )  # fmt: skip


def _check(
    rows: int,
    count: int,
    chunk: int,
    logits: Tensor,
    asked: tuple[Tensor, ...],
    tokens: Tensor,
    values: Tensor,
    sums: Tensor,
) -> None:
    for tensor, dtype in zip(asked, (torch.int64, torch.float64, torch.int64), strict=True):
        if tensor.shape != (rows,) or tensor.dtype is not dtype or not tensor.is_contiguous():
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"expected contiguous {dtype} [{rows}], got {found}")
    if not 0 < count <= chunk or count & (count - 1):
        raise ValueError(f"{count} candidates: it must be a power of two up to {chunk}")
    for name, out, width, dtype in (
        ("tokens", tokens, 1 + count, torch.int32),
        ("values", values, 1 + count, torch.float32),
        ("sums", sums, SUMS, torch.float32),
    ):
        if out.shape != (rows, width) or out.dtype is not dtype or not out.is_contiguous():
            raise ValueError(f"{name} must be contiguous {dtype} [{rows}, {width}]")
    if logits.stride(1) != 1:
        raise ValueError("rows of logits must be contiguous")
