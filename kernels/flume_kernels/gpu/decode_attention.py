"""Attention of a step's queries over paged KV, split over the chip, with the natural log-sum-exp.

    o = Σ_j exp(s_j − lse) v_j        lse = ln Σ_j exp(s_j)        s_j = scale · q · k_j

over the first `length` keys of each row: every held token lies in the past of every query, so there is no
mask but the length. No keys: o = 0, lse = −∞. Scores, sums and o are accumulated in float32; the weights
meet V in V's dtype (Q's for fp8). `reference.paged_attention` is the definition.

Bound by memory: each key and value is read once, for the group of query heads (and all queries of a query
tile) together. Programs stay on the chip and take items of the step's plan until none is left, so ragged
lengths do not leave it idle, and a captured launch has the same grid whatever the lengths. Not here:
attention within the chunk itself, which is causal and local.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flume_kernels.gpu.attention_plan import ITEM_WORDS, TILE_WORDS, AttentionPlan
from flume_kernels.gpu.kv_pool import FP8, KvPool

LOG2_E = 1.4426950408889634
MERGE_SPLITS = 32  # partials one step of the merge's loop takes in
OTHER_SHARED_BYTES = 8192  # queries, weights, reductions: 6 to 7 KiB at head_dim 128, as compiled
HEAD_DIMS = (64, 80, 96, 128, 256)


@triton.jit
def _block_ids(table_ptr, start, end, TILE_KEYS: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    # Beyond `end` the table may hold anything, so nothing there is read.
    if BLOCK_TOKENS % TILE_KEYS == 0:
        ids = tl.load(table_ptr + start // BLOCK_TOKENS, mask=start < end, other=0)
    else:
        keys = start + tl.arange(0, TILE_KEYS)
        ids = tl.load(table_ptr + keys // BLOCK_TOKENS, mask=keys < end, other=0)
    return ids


@triton.jit
def _dot(a, b, acc, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    # The interpreter multiplies the bits of bf16 as integers, so it is given float32 of the same values.
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _decode_kernel(
    q_ptr,  # [tokens, query_heads, head_dim]
    kv_ptr,  # [blocks, 2, kv_heads, block_tokens, head_dim]
    scales_ptr,  # [blocks, 2, kv_heads] fp32, read when SCALED
    tables_ptr,  # [rows, max_blocks] int32
    o_ptr,  # [tokens, query_heads, head_dim]
    lse_ptr,  # [tokens, query_heads] fp32
    partial_ptr,  # [items, kv_heads, TILE_ROWS, head_dim] fp32
    partial_lse_ptr,  # [items, kv_heads, TILE_ROWS] fp32, base 2
    items_ptr,
    counts_ptr,
    q_token_stride,
    o_token_stride,
    lse_token_stride,
    block_stride,
    value_offset,  # from K to V of a block
    head_stride,
    scale_block_stride,
    scale_value_offset,
    scale_head_stride,
    table_stride,
    score_scale,  # scale · log2(e)
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # next power of two >= HEAD_DIM
    BLOCK_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SCALED: tl.constexpr,
    Q_ON_HOST: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    ITEM: tl.constexpr,
):
    dims = tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, TILE_KEYS)
    tile_rows = tl.arange(0, TILE_ROWS)
    in_head = dims < HEAD_DIM
    one_block: tl.constexpr = BLOCK_TOKENS % TILE_KEYS == 0
    total = tl.load(counts_ptr) * KV_HEADS
    work = tl.program_id(0)
    while work < total:
        # Asked for early: the answer is needed only when this item is done.
        taken = tl.atomic_add(counts_ptr + 2, 1, sem="relaxed")
        item = work // KV_HEADS
        head = work % KV_HEADS
        words = items_ptr + item * ITEM
        row = tl.load(words)
        first_query = tl.load(words + 1)
        query_rows = tl.load(words + 2)
        tile_at = tl.load(words + 3)
        begin = tl.load(words + 4)
        end = tl.load(words + 5)
        splits = tl.load(words + 6)

        index = tile_at + tile_rows
        asked = index < query_rows
        token = (first_query + index // GROUP).to(tl.int64)
        query_head = head * GROUP + index % GROUP
        q_at = q_ptr + (token * q_token_stride + query_head * HEAD_DIM)[:, None] + dims[None, :]
        if Q_ON_HOST:
            q = tl.load(q_at, mask=asked[:, None] & in_head[None, :], other=0.0, volatile=True)
        else:
            q = tl.load(q_at, mask=asked[:, None] & in_head[None, :], other=0.0)

        table = tables_ptr + row.to(tl.int64) * table_stride
        keys_ptr = kv_ptr + head * head_stride
        key_scales_ptr = scales_ptr + head * scale_head_stride
        top = tl.full([TILE_ROWS], -float("inf"), tl.float32)
        weight = tl.zeros([TILE_ROWS], tl.float32)
        acc = tl.zeros([TILE_ROWS, BLOCK_D], tl.float32)
        blocks = _block_ids(table, begin, end, TILE_KEYS, BLOCK_TOKENS)
        for start in tl.range(begin, end, TILE_KEYS, num_stages=STAGES):
            keys = start + lanes
            held = keys < end
            within = (keys % BLOCK_TOKENS) * HEAD_DIM
            if one_block:
                at = (keys_ptr + blocks.to(tl.int64) * block_stride) + within[:, None] + dims[None, :]
            else:
                at = keys_ptr + (blocks.to(tl.int64) * block_stride + within)[:, None] + dims[None, :]
            if HEAD_DIM == BLOCK_D:
                k = tl.load(at, mask=held[:, None], other=0.0)
            else:
                k = tl.load(at, mask=held[:, None] & in_head[None, :], other=0.0)
            zero = tl.zeros([TILE_ROWS, TILE_KEYS], tl.float32)
            scores = _dot(q, tl.trans(k.to(q.dtype)), zero, WIDE, PRECISION) * score_scale
            if SCALED:
                scales_at = key_scales_ptr + blocks.to(tl.int64) * scale_block_stride
                scores *= tl.load(scales_at)[None, :] if not one_block else tl.load(scales_at)
            scores = tl.where(held[None, :], scores, -float("inf"))
            # The first key of a tile is always held, so the maximum is finite from here on.
            new_top = tl.maximum(top, tl.max(scores, 1))
            p = tl.exp2(scores - new_top[:, None])
            fade = tl.exp2(top - new_top)
            weight = weight * fade + tl.sum(p, 1)
            if SCALED:
                value_scale = tl.load(scales_at + scale_value_offset)
                p *= value_scale[None, :] if not one_block else value_scale
            if HEAD_DIM == BLOCK_D:
                v = tl.load(at + value_offset, mask=held[:, None], other=0.0)
            else:
                v = tl.load(at + value_offset, mask=held[:, None] & in_head[None, :], other=0.0)
            acc = _dot(p.to(q.dtype), v.to(q.dtype), acc * fade[:, None], WIDE, PRECISION)
            top = new_top
            blocks = _block_ids(table, start + TILE_KEYS, end, TILE_KEYS, BLOCK_TOKENS)

        some = weight != 0  # also where it is NaN, which must not pass for no keys
        o = acc / tl.where(some, weight, 1.0)[:, None]
        lse2 = tl.where(some, top + tl.log2(tl.where(some, weight, 1.0)), -float("inf"))
        if splits == 1:
            o_at = o_ptr + (token * o_token_stride + query_head * HEAD_DIM)[:, None] + dims[None, :]
            tl.store(o_at, o.to(o_ptr.dtype.element_ty), mask=asked[:, None] & in_head[None, :])
            tl.store(lse_ptr + token * lse_token_stride + query_head, lse2 * 0.6931471805599453, mask=asked)
        else:
            part = (item * KV_HEADS + head).to(tl.int64) * TILE_ROWS + tile_rows
            tl.store(
                partial_ptr + part[:, None] * HEAD_DIM + dims[None, :],
                o,
                mask=asked[:, None] & in_head[None, :],
            )
            tl.store(partial_lse_ptr + part, lse2, mask=asked)
        work = tl.num_programs(0) + taken


@triton.jit
def _merge_splits_kernel(
    partial_ptr,
    partial_lse_ptr,
    o_ptr,
    lse_ptr,
    tiles_ptr,
    counts_ptr,
    o_token_stride,
    lse_token_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    # One program per query row of a tile: splits lie TILE_ROWS · kv_heads rows apart.
    tile_row = tl.program_id(0)
    head = tl.program_id(1)
    tile = tl.program_id(2)
    if tile_row + head + tile == 0:
        tl.store(counts_ptr + 2, 0)  # the next layer takes its items from the start again
    if tile >= tl.load(counts_ptr + 1):
        return
    words = tiles_ptr + tile * TILE
    first_item = tl.load(words)
    splits = tl.load(words + 1)
    first_query = tl.load(words + 2)
    index = tl.load(words + 4) + tile_row
    if (splits == 1) | (index >= tl.load(words + 3)):
        return

    lanes = tl.arange(0, SPLITS)
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    top = -float("inf")
    weight = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for base in range(0, splits, SPLITS):
        real = base + lanes < splits
        part = ((first_item + base + lanes) * KV_HEADS + head).to(tl.int64) * TILE_ROWS + tile_row
        lse2 = tl.load(partial_lse_ptr + part, mask=real, other=-float("inf"))
        o = tl.load(
            partial_ptr + part[:, None] * HEAD_DIM + dims[None, :],
            mask=real[:, None] & in_head[None, :],
            other=0.0,
        )
        # Only rows with keys are split and no split of theirs is empty, so the maximum is finite.
        new_top = tl.maximum(top, tl.max(lse2, 0))
        p = tl.exp2(lse2 - new_top)
        fade = tl.exp2(top - new_top)
        weight = weight * fade + tl.sum(p, 0)
        acc = acc * fade + tl.sum(o * p[:, None], 0)
        top = new_top

    token = (first_query + index // GROUP).to(tl.int64)
    query_head = head * GROUP + index % GROUP
    o_at = o_ptr + token * o_token_stride + query_head * HEAD_DIM + dims
    tl.store(o_at, (acc / weight).to(o_ptr.dtype.element_ty), mask=in_head)
    tl.store(lse_ptr + token * lse_token_stride + query_head, (top + tl.log2(weight)) * 0.6931471805599453)


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the kernel runs on one kind of card; what the numbers compute does not depend on it."""

    tile_rows: int = 16
    tile_keys: int = 64
    num_warps: int = 4
    num_stages: int = 3
    programs_per_sm: int = 2


def default_config(head_dim: int, itemsize: int, group: int, queries: int, shared_bytes: int) -> DecodeConfig:
    """A sound choice where nothing was measured. `shared_bytes`: shared memory of one multiprocessor.

    Two programs a multiprocessor where each has room for two key tiles on their way, up to three; otherwise
    one. Larger query tiles for chunks.
    """
    tile_rows = min(max(16, triton.next_power_of_2(group * queries)), 64)
    tile_bytes = 2 * 64 * triton.next_power_of_2(head_dim) * itemsize
    for programs in (2, 1):
        tiles = min((shared_bytes // programs - OTHER_SHARED_BYTES) // tile_bytes, 3)
        if tiles >= 2:
            return DecodeConfig(tile_rows, 64, 4, tiles + 1, programs)
    return DecodeConfig(tile_rows, 32, 4, 3, 1)


def decode_attention(
    q: Tensor,
    pool: KvPool,
    tables: Tensor,
    plan: AttentionPlan,
    o: Tensor,
    lse: Tensor,
    scale: float,
    config: DecodeConfig,
    q_on_host: bool = False,
) -> None:
    """One layer's attention for the rows `plan` was updated with; writes `o` and `lse`, queues on the
    current stream.

    Args:
        q: [tokens, query_heads, head_dim], bf16, fp16 or fp32; heads contiguous, any token stride.
        pool: this layer's blocks; of Q's dtype, or fp8 with scales.
        tables: int32 [rows, max_blocks]: the blocks of each row in order. Entries past a row's length are
            not read.
        plan: updated for these rows; its shape's tiles are those of `config`.
        o: like q; lse: float32 [tokens, query_heads], natural log. Tokens of no row are not written.
        q_on_host: q lies in pinned host memory that the host or a peer writes; caches are then passed by.

    Raises ValueError when the arguments do not fit together.
    """
    _check(q, pool, tables, plan, o, lse, config)
    shape = plan.shape
    head_dim = pool.head_dim
    block_d = triton.next_power_of_2(head_dim)
    kv, scales = pool.kv, pool.scales
    scale_strides = scales.stride() if scales is not None else (0, 0, 0)
    _decode_kernel[(min(shape.slots, shape.max_items * shape.num_kv_heads),)](
        q, kv, scales if scales is not None else lse, tables, o, lse,
        plan.partial, plan.partial_lse, plan.items, plan.counts,
        q.stride(0), o.stride(0), lse.stride(0),
        kv.stride(0), kv.stride(1), kv.stride(2), *scale_strides, tables.stride(0),
        scale * LOG2_E,
        KV_HEADS=shape.num_kv_heads, GROUP=shape.group, HEAD_DIM=head_dim, BLOCK_D=block_d,
        BLOCK_TOKENS=pool.block_tokens, TILE_ROWS=shape.tile_rows, TILE_KEYS=shape.tile_keys,
        SCALED=scales is not None, Q_ON_HOST=q_on_host, WIDE=triton.knobs.runtime.interpret,
        PRECISION="ieee" if q.dtype is torch.float32 else "tf32", STAGES=config.num_stages, ITEM=ITEM_WORDS,
        num_warps=config.num_warps,
    )  # fmt: skip
    merge_rows = min(shape.tile_rows, shape.max_tokens * shape.group)
    if shape.one_query:
        merge_rows = min(merge_rows, shape.group)
    _merge_splits_kernel[(merge_rows, shape.num_kv_heads, shape.max_tiles)](
        plan.partial, plan.partial_lse, o, lse, plan.tiles, plan.counts, o.stride(0), lse.stride(0),
        KV_HEADS=shape.num_kv_heads, GROUP=shape.group, HEAD_DIM=head_dim, BLOCK_D=block_d,
        TILE_ROWS=shape.tile_rows, SPLITS=MERGE_SPLITS, TILE=TILE_WORDS, num_warps=4,
    )  # fmt: skip


def _check(
    q: Tensor, pool: KvPool, tables: Tensor, plan: AttentionPlan, o: Tensor, lse: Tensor, config: DecodeConfig
) -> None:
    shape = plan.shape
    tokens, query_heads, head_dim = q.shape
    wanted = {
        "query heads": (query_heads, shape.num_query_heads),
        "KV heads": (pool.num_kv_heads, shape.num_kv_heads),
        "head_dim": (head_dim, pool.head_dim),
        "plan's head_dim": (plan.partial.shape[-1], head_dim),
        "o's shape": (o.shape, q.shape),
        "lse's shape": (lse.shape, q.shape[:2]),
        "lse's dtype": (lse.dtype, torch.float32),
        "tables' dtype": (tables.dtype, torch.int32),
        "tile_rows": (config.tile_rows, shape.tile_rows),
        "tile_keys": (config.tile_keys, shape.tile_keys),
        "last strides": (
            (q.stride()[1:], o.stride()[1:], lse.stride(1), tables.stride(1)),
            ((head_dim, 1), (head_dim, 1), 1, 1),
        ),
    }
    for name, (given, expected) in wanted.items():
        if given != expected:
            raise ValueError(f"{name}: {given}, expected {expected}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim {head_dim} is not one of {HEAD_DIMS}")
    if tokens > shape.max_tokens:
        raise ValueError(f"{tokens} tokens, the plan was allocated for {shape.max_tokens}")
    if pool.kv.dtype not in (q.dtype, FP8):
        raise ValueError(f"KV is {pool.kv.dtype} and Q {q.dtype}: they must agree unless KV is fp8")


def softmax_scale(head_dim: int) -> float:
    """1 / √head_dim, the usual scale."""
    return 1.0 / math.sqrt(head_dim)
