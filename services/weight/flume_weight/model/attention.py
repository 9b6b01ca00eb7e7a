"""What a forward pass asks of attention. The weight engine answers over lanes, `local.py` in one process."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Attention(Protocol):
    """Called once per layer, in order: `query`, then `attend`."""

    def query(self, layer: int, q: Tensor) -> None:
        """q [T, query_heads, head_dim], roped and contiguous. Called before K and V are computed."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same q; k and v [T, kv_heads, head_dim], k roped.

        Returns [T, query_heads * head_dim] in q's dtype: causal attention of every row over the past
        of its sequence and itself, scaled by head_dim^-1/2.
        """
        ...
