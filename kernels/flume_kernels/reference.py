"""Slow, obvious definitions of what each kernel computes, in double precision. Tests compare against these.

Not for use in a service: nothing here is fast, and everything returns float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query over the keys it is allowed to see.

    q [n, Hq, D]; k, v [Hkv, S, D]; allowed bool [n, S], all when None. Query head h reads KV head
    h // (Hq / Hkv). Returns o [n, Hq, D] and lse [n, Hq] (natural log), both float64; a query
    without keys has o = 0 and lse = -inf.
    """
    group = q.shape[1] // k.shape[0]
    keys = k.double().repeat_interleave(group, 0)
    values = v.double().repeat_interleave(group, 0)
    scores = scale * torch.einsum("nhd,hsd->nhs", q.double(), keys)
    if allowed is not None:
        scores = scores.masked_fill(~allowed.unsqueeze(1), -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.where(lse.unsqueeze(-1) == -torch.inf, 0.0, torch.exp(scores - lse.unsqueeze(-1)))
    return torch.einsum("nhs,hsd->nhd", weights, values), lse


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`attention` of a chunk to itself: query i sees keys 0..i. q [T, Hq, D]; k, v [T, Hkv, D]."""
    tokens = q.shape[0]
    allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return attention(q, k.transpose(0, 1), v.transpose(0, 1), scale, allowed)


def merge_partials(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """o [P, T, H, D], lse [P, T, H] -> o [T, H, D], lse [T, H], both float64. Formula in `merge`."""
    top = lse.double().amax(dim=0)
    # Not lse - top where nothing was seen: -inf minus -inf is nan.
    weights = torch.exp(lse.double() - torch.where(top == -torch.inf, 0.0, top))
    sums = weights.sum(dim=0)
    values = torch.where((lse == -torch.inf).unsqueeze(-1), 0.0, o.double())
    merged = (weights.unsqueeze(-1) * values).sum(dim=0) / torch.where(sums > 0, sums, 1.0).unsqueeze(-1)
    return merged, top + torch.log(sums)
