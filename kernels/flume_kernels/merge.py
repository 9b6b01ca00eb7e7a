"""Merge partial attention over disjoint keys into attention over their union.

With normalised outputs o_i and log-sum-exps lse_i (natural log, float32, as everywhere here):

    M = max_i lse_i ;  w_i = exp(lse_i - M) ;  o = sum_i w_i o_i / sum_i w_i ;  lse = M + log(sum_i w_i)

A partial without keys has lse = -inf and weighs nothing, whatever its o holds. With no keys anywhere
o = 0 and lse = -inf. `reference.merge_partials` is the definition. Implemented for CPU tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merge_partials(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge P partials at once.

    o [P, T, H, D], float32, bfloat16 or float16; lse [P, T, H] float32.
    Returns o [T, H, D] in the dtype of `o`, and lse [T, H] float32. The sum runs in float32.
    """
    assert lse.shape == o.shape[:3], (o.shape, lse.shape)
    assert lse.dtype is torch.float32, lse.dtype
    total = torch.logsumexp(lse, dim=0)
    # softmax divides by the sum itself: exp(lse - total) would be off by the rounding of a large total.
    # Where every lse is -inf it is nan, so both lines select; 0 * nan is nan, too.
    weights = torch.softmax(lse, dim=0).masked_fill_(total == -torch.inf, 0.0).unsqueeze(-1)
    values = torch.where(weights > 0, o.float(), 0.0)
    return (weights * values).sum(dim=0).to(o.dtype), total


def merge_into(o: Tensor, lse: Tensor, other_o: Tensor, other_lse: Tensor) -> None:
    """Merge one more partial into `o` and `lse`, in place: the variant for every layer of every token.

    o [T, H, D] float32; lse [T, H] float32; other_o [T, H, D] in any float dtype, left as it is;
    other_lse [T, H] float32. 5 us for one token of 9 heads of 64 (`merge_partials`: 16 us).
    """
    assert o.dtype is torch.float32, o.dtype
    assert lse.dtype is torch.float32, lse.dtype
    # With two partials the weights are sigmoid(lse_1 - lse_0) and one minus that.
    difference = other_lse - lse
    if not math.isfinite(difference.sum().item()):
        _merge_into_with_empty(o, lse, other_o, other_lse, difference)
        return
    _merge_into_with_keys(o, lse, other_o, other_lse, difference)


def _merge_into_with_keys(o: Tensor, lse: Tensor, other_o: Tensor, other_lse: Tensor, diff: Tensor) -> None:
    o.lerp_(other_o.float(), diff.sigmoid_().unsqueeze(-1))
    torch.logaddexp(lse, other_lse, out=lse)


def _merge_into_with_empty(o: Tensor, lse: Tensor, other_o: Tensor, other_lse: Tensor, diff: Tensor) -> None:
    """Merge where some head of some token has no keys, or NaN, in one of the two.

    All others are merged as they would be without it, bit by bit: a token's result depends on no other's.
    """
    finite = diff.isfinite()
    merged_o, merged_lse = merge_partials(torch.stack([o, other_o.float()]), torch.stack([lse, other_lse]))
    _merge_into_with_keys(o, lse, other_o, other_lse, diff)
    torch.where(finite, lse, merged_lse, out=lse)
    torch.where(finite.unsqueeze(-1), o, merged_o, out=o)
