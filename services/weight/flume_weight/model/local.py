"""Attention with all KV in this process: for tests, and the oracle that split attention is held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class LocalAttention:
    """KV of several sequences. Before each pass, `next_pass` says how its rows are packed.

    Plain and exact, not fast: one call of attention per sequence and layer.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._past: dict[object, list[tuple[Tensor, Tensor]]] = {}
        self._pass: list[tuple[object, int]] = []

    def next_pass(self, packed: Sequence[tuple[object, int]]) -> None:
        """(sequence, rows) in the order in which the pass packs them; a new sequence starts empty."""
        self._pass = list(packed)

    def drop(self, sequence: object) -> None:
        self._past.pop(sequence, None)

    def length(self, sequence: object) -> int:
        """Tokens held of a sequence."""
        past = self._past.get(sequence)
        return past[-1][0].shape[0] if past else 0

    def query(self, layer: int, q: Tensor) -> None:
        """Nobody remote waits for it."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, query_heads, d], k, v [T, kv_heads, d] -> [T, query_heads * d], causal per sequence."""
        rows = [count for _, count in self._pass]
        parts = zip(self._pass, torch.split(q, rows), torch.split(k, rows), torch.split(v, rows), strict=True)
        return torch.cat([causal(pq, *self._extend(name, layer, pk, pv)) for (name, _), pq, pk, pv in parts])

    def _extend(self, sequence: object, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        past = self._past.setdefault(sequence, [])
        if len(past) == layer:
            past.append((k.clone(), v.clone()))
        else:
            old_k, old_v = past[layer]
            past[layer] = (torch.cat([old_k, k]), torch.cat([old_v, v]))
        return past[layer]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [n, query_heads, d]: the last n of the m tokens of k, v [m, kv_heads, d] -> [n, query_heads * d]."""
    n, m = q.shape[0], k.shape[0]
    mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return o.squeeze(0).transpose(0, 1).reshape(n, -1)
