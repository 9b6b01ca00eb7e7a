"""Attention of a chunk to itself, with its log-sum-exp, in plain torch operations: any device will do.

A chunk is bounded by arithmetic elsewhere (its projections), so this need not be fast; it must only not take
memory with the square of the chunk: queries are worked off in blocks. `flume_kernels.reference` is the
definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # queries at once: scores of 32 heads over 8192 keys take 256 MiB


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D]; k, v [T, Hkv, D] -> o float32 [T, Hq, D], lse float32 [T, Hq]. Token i sees 0..i."""
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.float().view(tokens, kv_heads, heads // kv_heads, dim)
    keys, values = k.float().permute(1, 2, 0), v.float().transpose(0, 1)  # [Hkv, D, T], [Hkv, T, D]
    o = torch.empty(tokens, heads, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    for start in range(0, tokens, block):
        end = min(start + block, tokens)
        rows = grouped[start:end].permute(1, 0, 2, 3).reshape(kv_heads, -1, dim)
        scores = (scale * rows @ keys[..., :end]).view(kv_heads, end - start, -1, end)
        ahead = torch.arange(end, device=q.device) > torch.arange(start, end, device=q.device)[:, None]
        scores.masked_fill_(ahead[:, None, :], -torch.inf)
        total = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - total.unsqueeze(-1)).view(kv_heads, -1, end)
        mixed = (weights @ values[:, :end]).view(kv_heads, end - start, -1, dim)
        o[start:end] = mixed.transpose(0, 1).reshape(end - start, heads, dim)
        lse[start:end] = total.transpose(0, 1).reshape(end - start, heads)
    return o, lse
