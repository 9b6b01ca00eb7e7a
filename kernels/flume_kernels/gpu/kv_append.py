"""Put new keys and values into their blocks.

Token i goes to slots[i] = block · block_tokens + offset, or nowhere when that is negative (padding of a
bucket). Into fp8 the value is divided by its block's scale and clamped to what e4m3 can hold. Exact
otherwise. `reference.kv_append` is the definition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flume_kernels.gpu.kv_pool import KvPool

FP8_MAX: tl.constexpr = tl.constexpr(448.0)


@triton.jit
def _kv_append_kernel(
    k_ptr,  # [tokens, kv_heads, head_dim]
    v_ptr,
    slots_ptr,  # [tokens] int64
    kv_ptr,  # [blocks, 2, kv_heads, block_tokens, head_dim]
    scales_ptr,  # [blocks, 2, kv_heads] fp32, read when SCALED
    k_token_stride,
    v_token_stride,
    block_stride,
    value_offset,
    head_stride,
    scale_block_stride,
    scale_value_offset,
    scale_head_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SCALED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    block = slot // BLOCK_TOKENS
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    k = tl.load(k_ptr + token * k_token_stride + head * HEAD_DIM + dims, mask=in_head)
    v = tl.load(v_ptr + token * v_token_stride + head * HEAD_DIM + dims, mask=in_head)
    if SCALED:
        scale_at = scales_ptr + block * scale_block_stride + head * scale_head_stride
        k = k.to(tl.float32) / tl.load(scale_at)
        v = v.to(tl.float32) / tl.load(scale_at + scale_value_offset)
        k = tl.minimum(tl.maximum(k, -FP8_MAX), FP8_MAX)
        v = tl.minimum(tl.maximum(v, -FP8_MAX), FP8_MAX)
    at = kv_ptr + block * block_stride + head * head_stride + (slot % BLOCK_TOKENS) * HEAD_DIM + dims
    tl.store(at, k.to(kv_ptr.dtype.element_ty), mask=in_head)
    tl.store(at + value_offset, v.to(kv_ptr.dtype.element_ty), mask=in_head)


def kv_append(pool: KvPool, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write k, v [tokens, kv_heads, head_dim] (heads contiguous, any token strides) to slots int64 [tokens].

    Queues one kernel on the current stream. Two tokens must not share a slot. Slots lie within the pool:
    that is the block allocator's to know and is not checked on the device. Raises ValueError when shapes or
    dtypes do not fit.
    """
    tokens = k.shape[0]
    wanted = (tokens, pool.num_kv_heads, pool.head_dim)
    if k.shape != wanted or v.shape != wanted or slots.shape != (tokens,) or slots.dtype is not torch.int64:
        raise ValueError(
            f"k {tuple(k.shape)}, v {tuple(v.shape)}, slots {slots.dtype} {tuple(slots.shape)}: "
            f"expected {wanted} twice and int64 [{tokens}]"
        )
    if {k.stride()[1:], v.stride()[1:]} != {(pool.head_dim, 1)}:
        raise ValueError("a token's heads must be contiguous")
    if pool.scales is None and {k.dtype, v.dtype} != {pool.kv.dtype}:
        raise ValueError(f"k is {k.dtype} and v {v.dtype}, the pool {pool.kv.dtype}")
    if tokens:
        scales = pool.scales
        _kv_append_kernel[(tokens, pool.num_kv_heads)](
            k, v, slots, pool.kv, scales if scales is not None else k,
            k.stride(0), v.stride(0), pool.kv.stride(0), pool.kv.stride(1), pool.kv.stride(2),
            *(scales.stride() if scales is not None else (0, 0, 0)),
            HEAD_DIM=pool.head_dim, BLOCK_D=triton.next_power_of_2(pool.head_dim),
            BLOCK_TOKENS=pool.block_tokens, SCALED=scales is not None, num_warps=1,
        )  # fmt: skip
