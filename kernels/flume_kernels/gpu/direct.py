"""Where two devices meet in memory that both have mapped: flags, and partials that are merged there.

Where things go is in tables of addresses, int64 in device memory, so one captured graph serves every route:
a replay reads its tables anew. Address 0 is nobody's, and nothing is read or written for it.

A flag is an int64 that only grows. One end raises it to the mark of a layer of a step, the other waits until
it is at least that:

    mark(step, layer) = (step << LAYER_BITS) + layer + 1

Steps count up, so what an abandoned step left behind never passes for a later one. Nobody writes poison into
memory of others; whoever waits looks at a word of its own host now and then (*abort*, a gate of
`flags.FlagBlock`), and notes poison in its *status*. From then on a step asks and answers nothing.

The memory must take this device's atomic operations: its own, or that of a card over NVLink. What is read
after `await_flags` on the same stream is what was written before the flag was raised.
`direct_reference` has the definitions.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from flume_kernels.gpu.decode_merge import own_part
from flume_kernels.gpu.flags import LAYER_BITS, POISON
from flume_kernels.gpu.merge_partials import fold
from flume_kernels.gpu.signals import give_signal

ROUNDS_PER_LOOK = 64  # a look at host memory takes longer than a round, and delays what it comes before
_ALIGNMENT_BYTES = 16


@triton.jit(do_not_specialize=["layer"])
def _raise_kernel(
    at_ptr,
    step_ptr,
    layer,
    status_ptr,
    signal_ptr,
    counter_ptr,
    count,
    LAYERS: tl.constexpr,
    POISONED: tl.constexpr,
    SIGNALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.arange(0, BLOCK)
    address = tl.load(at_ptr + at, mask=at < count, other=0)
    mark = tl.zeros([BLOCK], tl.int64) + (tl.load(step_ptr) << LAYERS) + layer + 1
    good = tl.load(status_ptr) == 0
    tl.atomic_xchg(
        address.to(tl.pointer_type(tl.int64)), mark, mask=(address != 0) & good, sem="release", scope="sys"
    )
    if SIGNALS:
        give_signal(signal_ptr, counter_ptr, good, POISONED)


@triton.jit(do_not_specialize=["layer"])
def _await_kernel(
    at_ptr,
    step_ptr,
    layer,
    abort_ptr,
    status_ptr,
    count,
    LAYERS: tl.constexpr,
    POISONED: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.arange(0, BLOCK)
    address = tl.load(at_ptr + at, mask=at < count, other=0)
    theirs = address != 0
    flag = address.to(tl.pointer_type(tl.int64))
    mark = (tl.load(step_ptr) << LAYERS) + layer + 1
    poisoned = tl.load(status_ptr) != 0
    behind = 1
    rounds = 0
    while (behind > 0) & (poisoned == 0):
        seen = tl.load(flag, mask=theirs, other=POISONED, volatile=True)
        behind = tl.max((seen < mark).to(tl.int32), 0)
        rounds += 1
        if rounds % ROUNDS == 0:
            poisoned = (tl.load(abort_ptr, volatile=True) >= POISONED) & (behind > 0)
    if poisoned:
        tl.store(status_ptr, 1)
    # A volatile load orders nothing after it. One operation at the end does, and the spinning stays cheap.
    tl.atomic_add(flag, tl.zeros([BLOCK], tl.int64), mask=theirs, sem="acquire", scope="sys")


@triton.jit
def _merge_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, KV_HEADS, D]
    v_ptr,
    o_at_ptr,  # [P, T], address of [H, D]
    lse_at_ptr,  # [P, T], address of fp32 [H]
    out_ptr,  # [T, H, D]
    q_token_stride,
    k_token_stride,
    v_token_stride,
    tokens,
    heads,
    scale,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr,
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
    for part in tl.static_range(PARTS):  # unrolled: no part's address waits for the one before
        o_at = tl.load(o_at_ptr + part * tokens + token)
        lse_at = tl.load(lse_at_ptr + part * tokens + token)
        theirs = lse_at != 0
        o_from = tl.multiple_of(o_at.to(tl.pointer_type(q_ptr.dtype.element_ty)), ALIGNED)
        lse_from = lse_at.to(tl.pointer_type(tl.float32)) + head
        lse = tl.load(lse_from, mask=theirs, other=-float("inf"), volatile=True)
        o = tl.load(o_from + head * HEAD_DIM + dims, mask=in_head & theirs, other=0.0, volatile=True)
        top, weight, acc = fold(top, weight, acc, lse, o)
    row = token * heads + head
    tl.store(out_ptr + row * HEAD_DIM + dims, (acc / weight).to(out_ptr.dtype.element_ty), mask=in_head)


def raise_flags(
    flags_at: Tensor,
    step: Tensor,
    layer: int,
    status: Tensor,
    signal: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Raise every flag of the table to this layer's mark, after everything earlier on the stream is visible
    to all; none when `status` is set. flags_at int64 [N]; step, status int64 [1]. One kernel on this stream.

    `signal`: a flag and its counter, for which it does what `signals.signal` does as well.
    """
    flag, counter = signal or (status, status)
    _check_words(flags_at, step, status, flag, counter)
    block, num_warps = _block(flags_at)
    _raise_kernel[(1,)](
        flags_at, step, layer, status, flag, counter, flags_at.numel(),
        LAYERS=LAYER_BITS, POISONED=POISON, SIGNALS=signal is not None, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip


def await_flags(flags_at: Tensor, step: Tensor, layer: int, abort: Tensor, status: Tensor) -> None:
    """Hold this stream until every flag of the table has this layer's mark, or `abort` holds POISON, which
    sets `status`; not at all when that is set. abort int64 [1] in host memory, the others as in
    `raise_flags`."""
    _check_words(flags_at, step, status, abort)
    block, num_warps = _block(flags_at)
    _await_kernel[(1,)](
        flags_at, step, layer, abort, status, flags_at.numel(),
        LAYERS=LAYER_BITS, POISONED=POISON, ROUNDS=ROUNDS_PER_LOOK, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip


def direct_merge(
    q: Tensor, k: Tensor, v: Tensor, o_at: Tensor, lse_at: Tensor, out: Tensor, scale: float
) -> None:
    """`decode_merge.decode_merge` of partials that lie wherever the tables say.

    Args:
        q, k, v, out: as there; o in the dtype of q.
        o_at, lse_at: int64 [P, T] contiguous, of o [H, D] and float32 lse [H], contiguous. Those of o are
            multiples of what both 16 and its bytes are multiples of; both are 0 where there is no such part.
    """
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    for table in (o_at, lse_at):
        _check_table(table, tokens)
    if len(o_at) != len(lse_at):
        raise ValueError(f"{len(o_at)} parts of o, {len(lse_at)} of lse")
    if {k.shape, v.shape} != {(tokens, kv_heads, head_dim)} or heads % kv_heads or out.shape != q.shape:
        raise ValueError(f"k {tuple(k.shape)}, v {tuple(v.shape)}, out {tuple(out.shape)} do not fit q")
    if {q.stride()[1:], k.stride()[1:], v.stride()[1:]} != {(head_dim, 1)} or not out.is_contiguous():
        raise ValueError("a token's heads, and out, must be contiguous")
    if tokens:
        _merge_kernel[(tokens, heads)](
            q, k, v, o_at, lse_at, out, q.stride(0), k.stride(0), v.stride(0), tokens, heads, scale,
            PARTS=len(o_at), GROUP=heads // kv_heads,
            HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
            ALIGNED=_aligned(heads * head_dim * q.element_size()), num_warps=1,
        )  # fmt: skip


def _aligned(row_bytes: int) -> int:
    return math.gcd(row_bytes, _ALIGNMENT_BYTES)


def _block(flags_at: Tensor) -> tuple[int, int]:
    """Elements and warps of the one program that sees to all flags."""
    block = triton.next_power_of_2(flags_at.numel())
    return block, 1 if block <= 128 else 4


def _check_table(table: Tensor, rows: int) -> None:
    if table.dtype is not torch.int64 or table.shape[1:] != (rows,) or not table.is_contiguous():
        raise ValueError(f"a table of addresses is int64 [P, {rows}], got {table.dtype} {tuple(table.shape)}")


def _check_words(flags_at: Tensor, *words: Tensor) -> None:
    if any(word.dtype is not torch.int64 or word.numel() != 1 for word in words):
        raise ValueError("step, status and abort are int64 [1]")
    if flags_at.dtype is not torch.int64 or flags_at.dim() != 1 or not flags_at.is_contiguous():
        raise ValueError(f"flags_at is int64 [N], got {flags_at.dtype} {tuple(flags_at.shape)}")
