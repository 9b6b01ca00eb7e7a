"""Rotary position embedding, written straight to where the result is needed: a send buffer for Q, a frame
for K.

    out[:h] = a · cos − b · sin      out[h:] = b · cos + a · sin      with a, b the halves of a head, h =
    head_dim / 2

The angles come as tables of cosines and sines by position (float32), so any scaling of frequencies is the
caller's. Computed in float32. `reference.rope` is the definition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rope_kernel(
    x_ptr,  # [tokens, heads, 2 · HALF]
    positions_ptr,  # [tokens] int32 or int64
    cos_ptr,  # [positions, HALF] fp32
    sin_ptr,
    out_ptr,  # [tokens, heads, 2 · HALF]
    x_token_stride,
    out_token_stride,
    heads,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    cols = tl.arange(0, BLOCK_HALF)
    in_half = cols < HALF
    inside = (head < heads)[:, None] & in_half[None, :]
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * HALF + cols, mask=in_half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * HALF + cols, mask=in_half, other=0.0)[None, :]
    at = (head * 2 * HALF)[:, None] + cols[None, :]
    x_at = x_ptr + token * x_token_stride + at
    a = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_at + HALF, mask=inside, other=0.0).to(tl.float32)
    out_at = out_ptr + token * out_token_stride + at
    tl.store(out_at, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_at + HALF, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=inside)


def rope(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotate every head of every token by its position. Queues one kernel on the current stream.

    Args:
        x: [tokens, heads, head_dim], heads contiguous, any token stride (a slice of a fused projection will
            do).
        positions: int32 or int64 [tokens], below cos.shape[0].
        cos, sin: float32 [positions, head_dim / 2], contiguous.
        out: like x, its own token stride; device memory or pinned host memory. May be x itself.

    Raises ValueError when shapes, dtypes or strides do not fit.
    """
    tokens, heads, head_dim = x.shape
    half = head_dim // 2
    if out.shape != x.shape or positions.shape != (tokens,):
        raise ValueError(f"x {tuple(x.shape)}, out {tuple(out.shape)}, positions {tuple(positions.shape)}")
    if cos.shape != sin.shape or cos.shape[1] != half or {cos.dtype, sin.dtype} != {torch.float32}:
        raise ValueError(
            f"cos and sin must be float32 [positions, {half}], got {tuple(cos.shape)} {cos.dtype}"
        )
    if {x.stride()[1:], out.stride()[1:]} != {(head_dim, 1)} or not (
        cos.is_contiguous() and sin.is_contiguous()
    ):
        raise ValueError("heads of x and out, and the tables, must be contiguous")
    if tokens:
        block_heads = min(triton.next_power_of_2(heads), 8)
        _rope_kernel[(tokens, triton.cdiv(heads, block_heads))](
            x, positions, cos, sin, out, x.stride(0), out.stride(0), heads,
            HALF=half, BLOCK_HALF=triton.next_power_of_2(half), BLOCK_HEADS=block_heads, num_warps=2,
        )  # fmt: skip
