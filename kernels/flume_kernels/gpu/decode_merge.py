"""A decode step's attention, put together: each token's attention to itself, and the partials of others.

    lse_0 = scale · q · k    o_0 = v    M = max_p lse_p    o = Σ_p exp(lse_p − M) o_p / Σ_p exp(lse_p − M)

with p running over the token itself and P partials. A partial without keys has lse = −∞ and weighs nothing,
whatever its o holds; the token itself always weighs something. Sums run in float32.
`reference.decode_merge` is the definition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flume_kernels.gpu.merge_partials import fold


@triton.jit
def own_part(q_ptr, k_ptr, v_ptr, scale, dims, in_head):
    """(lse, weight, o) of a token's attention to itself, from its head of q and of k and v.

    Its lse is finite, so a merge that starts from here always has something to divide by.
    """
    q = tl.load(q_ptr + dims, mask=in_head, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + dims, mask=in_head, other=0.0).to(tl.float32)
    o = tl.load(v_ptr + dims, mask=in_head, other=0.0).to(tl.float32)
    return tl.sum(q * k, 0) * scale, 1.0, o


@triton.jit
def _decode_merge_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, KV_HEADS, D]
    v_ptr,
    o_ptr,  # [P, T, H, D]
    lse_ptr,  # [P, T, H] fp32
    out_ptr,  # [T, H, D]
    q_token_stride,
    k_token_stride,
    v_token_stride,
    o_part_stride,
    o_token_stride,
    lse_part_stride,
    lse_token_stride,
    num_parts,
    heads,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ON_HOST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    kv_head = (head // GROUP) * HEAD_DIM
    top, weight, acc = own_part(
        q_ptr + token * q_token_stride + head * HEAD_DIM,
        k_ptr + token * k_token_stride + kv_head,
        v_ptr + token * v_token_stride + kv_head,
        scale,
        dims,
        in_head,
    )
    o_at = o_ptr + token * o_token_stride + head * HEAD_DIM + dims
    lse_at = lse_ptr + token * lse_token_stride + head
    for part in range(num_parts):
        far = tl.cast(part, tl.int64)
        if ON_HOST:
            lse = tl.load(lse_at + far * lse_part_stride, volatile=True)
            o = tl.load(o_at + far * o_part_stride, mask=in_head, other=0.0, volatile=True)
        else:
            lse = tl.load(lse_at + far * lse_part_stride)
            o = tl.load(o_at + far * o_part_stride, mask=in_head, other=0.0)
        top, weight, acc = fold(top, weight, acc, lse, o)
    row = token * heads + head
    tl.store(out_ptr + row * HEAD_DIM + dims, (acc / weight).to(out_ptr.dtype.element_ty), mask=in_head)


def decode_merge(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    out: Tensor,
    scale: float,
    on_host: bool = False,
) -> None:
    """One layer's attention of T tokens that each see themselves and what P partials cover. Queues one kernel
    on the current stream.

    Args:
        q: [T, H, D]; k, v: [T, KV heads, D]; bf16, fp16 or fp32, a token's heads contiguous, any token
            stride.
        o: [P, T, H, D]; lse: float32 [P, T, H], natural log; a token's heads contiguous, any other strides.
        out: [T, H, D] contiguous, any of these dtypes.
        on_host: o and lse lie in pinned host memory that others write; caches are then passed by.

    Raises ValueError when shapes, dtypes or strides do not fit.
    """
    parts, tokens, heads, head_dim = o.shape
    kv_heads = k.shape[1]
    if {q.shape, out.shape} != {(tokens, heads, head_dim)} or lse.shape != (parts, tokens, heads):
        raise ValueError(
            f"q {tuple(q.shape)}, out {tuple(out.shape)}, o {tuple(o.shape)} and lse {tuple(lse.shape)}"
            " do not fit"
        )
    if {k.shape, v.shape} != {(tokens, kv_heads, head_dim)} or heads % kv_heads:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit q {tuple(q.shape)}")
    if lse.dtype is not torch.float32:
        raise ValueError(f"lse must be float32, got {lse.dtype}")
    inner = {q.stride()[1:], k.stride()[1:], v.stride()[1:], o.stride()[2:]}
    if inner != {(head_dim, 1)} or lse.stride(2) != 1 or not out.is_contiguous():
        raise ValueError("a token's heads, and out, must be contiguous")
    if tokens:
        _decode_merge_kernel[(tokens, heads)](
            q, k, v, o, lse, out,
            q.stride(0), k.stride(0), v.stride(0), o.stride(0), o.stride(1), lse.stride(0), lse.stride(1),
            parts, heads, scale,
            GROUP=heads // kv_heads, HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
            ON_HOST=on_host, num_warps=1,
        )  # fmt: skip
