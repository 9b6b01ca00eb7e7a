"""Attention that also returns its log-sum-exp, so that partials over disjoint keys can be merged.

`partial_attention` is what an attention node computes: no mask, no positions, every key visible to
every query. `causal_attention` is what a weight node computes over the tokens of its own pass.
`reference` holds the definitions. Implemented for CPU tensors, on the fused flash operator of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flume_kernels.merge import merge_into

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class KvRun(NamedTuple):
    """Keys and values of tokens that lie next to each other in memory, [Hkv, S, D] each."""

    k: Tensor
    v: Tensor


def partial_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [n, Hq, D]; k, v [Hkv, S, D] with any stride between heads -> o [n, Hq, D], lse [n, Hq] float32.

    Without keys (S = 0) o is 0 and lse is -inf.
    """
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    attend_runs(q, (KvRun(k, v),), scale, o, lse)
    return o, lse


def attend_runs(q: Tensor, runs: Sequence[KvRun], scale: float, o: Tensor, lse: Tensor) -> None:
    """Attention of q [n, Hq, D] over the union of `runs`, into o [n, Hq, D] and lse [n, Hq] float32.

    o and lse are contiguous and may be any memory, a registered send buffer for one. Keys and values
    are read where they lie.
    """
    runs = [run for run in runs if run.k.shape[1]]
    if not runs:
        o.zero_()
        lse.fill_(-torch.inf)
        return
    if len(runs) == 1:
        _attend(q, runs[0], scale, o, lse)
        return
    total = o if o.dtype is torch.float32 else torch.empty(o.shape, dtype=torch.float32)
    _attend(q, runs[0], scale, total, lse)
    other_o, other_lse = torch.empty_like(q, memory_format=torch.contiguous_format), torch.empty_like(lse)
    for run in runs[1:]:
        _attend(q, run, scale, other_o, other_lse)
        merge_into(total, lse, other_o, other_lse)
    if total is not o:
        o.copy_(total)


def _attend(q: Tensor, run: KvRun, scale: float, o: Tensor, lse: Tensor) -> None:
    n, query_heads, head_dim = q.shape
    kv_heads = run.k.shape[0]
    group = query_heads // kv_heads
    k, v = run.k.unsqueeze(0), run.v.unsqueeze(0)
    # The queries that share a KV head become rows of one head, so that each key is read once. The
    # operator also takes fewer KV heads than query heads, 8 times slower in bfloat16 (4096 keys).
    if n == 1:
        out, out_lse = _flash(q.view(1, kv_heads, group, head_dim), k, v, scale=scale)[:2]
        o.view(1, kv_heads, group, head_dim).copy_(out)
        lse.view(1, kv_heads, group).copy_(out_lse)
        return
    rows = q.view(n, kv_heads, group, head_dim).transpose(0, 1).reshape(1, kv_heads, n * group, head_dim)
    out, out_lse = _flash(rows, k, v, scale=scale)[:2]
    o.view(n, kv_heads, group, head_dim).copy_(out[0].unflatten(1, (n, group)).transpose(0, 1))
    lse.view(n, kv_heads, group).copy_(out_lse[0].unflatten(1, (n, group)).transpose(0, 1))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of the tokens of one pass to themselves: token i sees tokens 0..i.

    q [T, Hq, D]; k, v [T, Hkv, D] -> o [T, Hq, D] in the dtype of q, lse [T, Hq] float32.
    """
    if q.shape[0] == 1:
        return partial_attention(q, k.transpose(0, 1), v.transpose(0, 1), scale)
    heads_first = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
    o, lse = _flash(*heads_first, 0.0, True, scale=scale)[:2]
    return o[0].transpose(0, 1), lse[0].transpose(0, 1)
