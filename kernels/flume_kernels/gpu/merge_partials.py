"""Merge the partials of several ranges into attention over all of them.

    M = max_p lse_p      w_p = exp(lse_p − M)      o = Σ w_p o_p / Σ w_p      lse = M + ln Σ w_p

A part without keys has lse = −∞ and weighs nothing, whatever its o holds; parts that are all empty give o =
0 and lse = −∞. Sums run in float32. `reference.merge_partials` is the definition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def fold(top, weight, acc, lse, o):
    """One more part (lse, o) into a running maximum, the weights' sum and the weighted sum of o."""
    new_top = tl.maximum(top, lse)
    # −∞ minus −∞ is nan: shift by 0 while nothing has been seen.
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    fade = tl.exp(top - shift)
    share = tl.exp(lse - shift)
    # An empty part may hold anything, even nan: select, as 0 · nan is nan. A share of nan stays one.
    acc = acc * fade + tl.where(share == 0, 0.0, o.to(tl.float32) * share)
    return new_top, weight * fade + share, acc


@triton.jit
def _merge_partials_kernel(
    o_ptr,  # [P, T, H, D]
    lse_ptr,  # [P, T, H] fp32
    out_ptr,  # [T, H, D]
    out_lse_ptr,  # [T, H] fp32
    o_part_stride,
    o_token_stride,
    lse_part_stride,
    lse_token_stride,
    num_parts,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ON_HOST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    o_at = o_ptr + token * o_token_stride + head * HEAD_DIM + dims
    lse_at = lse_ptr + token * lse_token_stride + head
    top = -float("inf")
    weight = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for part in range(num_parts):
        far = tl.cast(part, tl.int64)
        if ON_HOST:
            lse = tl.load(lse_at + far * lse_part_stride, volatile=True)
            o = tl.load(o_at + far * o_part_stride, mask=in_head, other=0.0, volatile=True)
        else:
            lse = tl.load(lse_at + far * lse_part_stride)
            o = tl.load(o_at + far * o_part_stride, mask=in_head, other=0.0)
        top, weight, acc = fold(top, weight, acc, lse, o)

    some = weight != 0  # also where it is NaN, which must not pass for no keys
    divisor = tl.where(some, weight, 1.0)
    out = tl.where(some, acc / divisor, 0.0)
    row = token * heads + head
    tl.store(out_ptr + row * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=in_head)
    tl.store(out_lse_ptr + row, tl.where(some, top + tl.log(divisor), -float("inf")))


def merge_partials(o: Tensor, lse: Tensor, out: Tensor, out_lse: Tensor, on_host: bool = False) -> None:
    """Merge P partials; queues one kernel on the current stream.

    Args:
        o: [P, T, H, D], bf16, fp16 or fp32; a token's heads contiguous, any part and token stride.
        lse: float32 [P, T, H], natural log; heads contiguous.
        out: [T, H, D] contiguous, any of these dtypes; out_lse: float32 [T, H] contiguous.
        on_host: o and lse lie in pinned host memory that others write; caches are then passed by.

    Raises ValueError when shapes, dtypes or strides do not fit.
    """
    parts, tokens, heads, head_dim = o.shape
    if lse.shape != (parts, tokens, heads) or out.shape != (tokens, heads, head_dim):
        raise ValueError(f"o {tuple(o.shape)}, lse {tuple(lse.shape)} and out {tuple(out.shape)} do not fit")
    if out_lse.shape != (tokens, heads) or {lse.dtype, out_lse.dtype} != {torch.float32}:
        raise ValueError(f"lse and out_lse must be float32, out_lse [{tokens}, {heads}]")
    if o.stride()[2:] != (head_dim, 1) or lse.stride(2) != 1:
        raise ValueError(f"a token's heads must be contiguous, strides are {o.stride()} and {lse.stride()}")
    if not (out.is_contiguous() and out_lse.is_contiguous()):
        raise ValueError("out and out_lse must be contiguous")
    if tokens:
        _merge_partials_kernel[(tokens, heads)](
            o, lse, out, out_lse, o.stride(0), o.stride(1), lse.stride(0), lse.stride(1), parts, heads,
            HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), ON_HOST=on_host, num_warps=1,
        )  # fmt: skip
