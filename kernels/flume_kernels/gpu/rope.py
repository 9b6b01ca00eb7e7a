"""Rotary position embedding, written straight to all the places where the result is needed: Q here and in a
send buffer or in memory of others, K here and, with V, in a send buffer.

    out[:h] = a · cos − b · sin      out[h:] = b · cos + a · sin      with a, b the halves of a head, h =
    head_dim / 2

The angles come as tables of cosines and sines by position (float32), so any scaling of frequencies is the
caller's. Computed in float32. `reference.rope` is the definition.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_ALIGNMENT_BYTES = 16


@triton.jit
def _rope_kernel(
    x_ptr,  # [tokens, heads, 2 · HALF]
    positions_ptr,  # [tokens] int32 or int64
    cos_ptr,  # [positions, HALF] fp32
    sin_ptr,
    out_ptr,  # [tokens, heads, 2 · HALF]
    also_ptr,  # like it
    at_ptr,  # [PARTS, tokens] int64, addresses of [heads, 2 · HALF]
    v_ptr,  # [tokens, heads, 2 · HALF]: copied as it is, to where the next is
    values_ptr,
    x_token_stride,
    out_token_stride,
    also_token_stride,
    v_token_stride,
    tokens,
    heads,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    ALSO: tl.constexpr,
    PARTS: tl.constexpr,
    COPIES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    cols = tl.arange(0, BLOCK_HALF)
    in_half = cols < HALF
    inside = (head < heads)[:, None] & in_half[None, :]
    at = (head * 2 * HALF)[:, None] + cols[None, :]
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * HALF + cols, mask=in_half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * HALF + cols, mask=in_half, other=0.0)[None, :]
    x_at = x_ptr + token * x_token_stride + at
    a = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_at + HALF, mask=inside, other=0.0).to(tl.float32)
    first = (a * cos - b * sin).to(out_ptr.dtype.element_ty)
    second = (b * cos + a * sin).to(out_ptr.dtype.element_ty)
    out_at = out_ptr + token * out_token_stride + at
    tl.store(out_at, first, mask=inside)
    tl.store(out_at + HALF, second, mask=inside)
    if ALSO:
        also_at = also_ptr + token * also_token_stride + at
        tl.store(also_at, first, mask=inside)
        tl.store(also_at + HALF, second, mask=inside)
    for part in tl.static_range(PARTS):
        address = tl.load(at_ptr + part * tokens + token)
        theirs = inside & (address != 0)
        there = tl.multiple_of(address.to(tl.pointer_type(out_ptr.dtype.element_ty)), ALIGNED) + at
        tl.store(there, first, mask=theirs)
        tl.store(there + HALF, second, mask=theirs)
    if COPIES:
        v_at = v_ptr + token * v_token_stride + at
        values_at = values_ptr + token * also_token_stride + at
        tl.store(values_at, tl.load(v_at, mask=inside), mask=inside)
        tl.store(values_at + HALF, tl.load(v_at + HALF, mask=inside), mask=inside)


def rope(
    x: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    also: Tensor | None = None,
    addresses: Tensor | None = None,
) -> None:
    """Rotate every head of every token by its position. Queues one kernel on the current stream.

    Args:
        x: [tokens, heads, head_dim], heads contiguous, any token stride (a slice of a fused projection will
            do).
        positions: int32 or int64 [tokens], below cos.shape[0].
        cos, sin: float32 [positions, head_dim / 2], contiguous.
        out: like x, its own token stride; device memory or pinned host memory. May be x itself.
        also: a second place, like out.
        addresses: int64 [P, tokens] contiguous: more places, each of memory for one token in out's dtype, at
            a multiple of what both 16 and a token's bytes are multiples of. 0 is none.

    Raises ValueError when shapes, dtypes or strides do not fit.
    """
    _check(positions, cos, sin, x, out, *([] if also is None else [also]))
    if also is not None and also.dtype is not out.dtype:
        raise ValueError(f"out is {out.dtype}, also {also.dtype}")
    if addresses is not None:
        _check_addresses(addresses, len(x))
    _launch(x, positions, cos, sin, out, also, addresses)


def rope_keys(
    k: Tensor, v: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, out: Tensor, kv: Tensor
) -> None:
    """Rotate K as `rope` does, here and into a send buffer, and copy V there. Queues one kernel.

    Args:
        k, v: [tokens, heads, head_dim], heads contiguous, any token stride.
        positions, cos, sin: as in `rope`.
        out: [tokens, heads, head_dim] contiguous, for K.
        kv: [2, tokens, heads, head_dim] contiguous, of their dtype; device memory or pinned host memory.

    Raises ValueError when shapes, dtypes or strides do not fit.
    """
    tokens, heads, head_dim = k.shape
    _check(positions, cos, sin, k, v, out)
    if kv.shape != (2, *k.shape) or not (kv.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"kv must be contiguous [2, {tokens}, {heads}, {head_dim}], and out contiguous")
    if len({k.dtype, v.dtype, out.dtype, kv.dtype}) > 1:
        raise ValueError(f"k {k.dtype}, v {v.dtype}, out {out.dtype} and kv {kv.dtype} must have one dtype")
    _launch(k, positions, cos, sin, out, also=kv[0], copied=(v, kv[1]))


def _launch(
    x: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    also: Tensor | None = None,
    addresses: Tensor | None = None,
    copied: tuple[Tensor, Tensor] | None = None,
) -> None:
    tokens, heads, head_dim = x.shape
    if not tokens:
        return
    half, block_heads = head_dim // 2, min(triton.next_power_of_2(heads), 8)
    second, table = out if also is None else also, positions if addresses is None else addresses
    v, values = copied or (x, out)
    _rope_kernel[(tokens, triton.cdiv(heads, block_heads))](
        x, positions, cos, sin, out, second, table, v, values,
        x.stride(0), out.stride(0), second.stride(0), v.stride(0), tokens, heads,
        HALF=half, BLOCK_HALF=triton.next_power_of_2(half), BLOCK_HEADS=block_heads,
        ALSO=also is not None, PARTS=0 if addresses is None else len(addresses), COPIES=copied is not None,
        ALIGNED=math.gcd(heads * head_dim * out.element_size(), _ALIGNMENT_BYTES), num_warps=2,
    )  # fmt: skip


def _check(positions: Tensor, cos: Tensor, sin: Tensor, x: Tensor, *others: Tensor) -> None:
    tokens, _, head_dim = x.shape
    half = head_dim // 2
    if {each.shape for each in others} != {x.shape} or positions.shape != (tokens,):
        shapes = [tuple(each.shape) for each in (x, *others)]
        raise ValueError(f"shapes {shapes} differ, or do not fit positions {tuple(positions.shape)}")
    if cos.shape != sin.shape or cos.shape[1] != half or {cos.dtype, sin.dtype} != {torch.float32}:
        raise ValueError(
            f"cos and sin must be float32 [positions, {half}], got {tuple(cos.shape)} {cos.dtype}"
        )
    if {each.stride()[1:] for each in (x, *others)} != {(head_dim, 1)} or not (
        cos.is_contiguous() and sin.is_contiguous()
    ):
        raise ValueError("a token's heads, and the tables, must be contiguous")


def _check_addresses(table: Tensor, tokens: int) -> None:
    if table.dtype is not torch.int64 or table.shape[1:] != (tokens,) or not table.is_contiguous():
        raise ValueError(f"addresses are int64 [P, {tokens}], got {table.dtype} {tuple(table.shape)}")
