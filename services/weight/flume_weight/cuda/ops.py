"""The operations of a decode step: the products with the weights, and the small ones between them.

`Ops` is what `decode_step` asks for; `TritonOps` are the kernels of `flume_kernels.gpu`. Each queues on the
current stream and reads nothing on the host. Tests use the kernels' definitions in their place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flume_weight.cuda.products import Choice, Normed, Products
from flume_weight.cuda.shortlist_buffers import ShortlistBuffers
from flume_weight.model.config import ModelConfig
from flume_weight.model.linear import Linear
from flume_weight.model.rope import cos_and_sin


@dataclass(frozen=True, slots=True)
class Angles:
    """cos and sin float32 [context, head_dim / 2] of every position, times RoPE's attention factor."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, config: ModelConfig, device: torch.device) -> Angles:
        cos, sin = cos_and_sin(config)
        return cls(cos.to(device), sin.to(device))


class Ops(Protocol):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [rows, size] -> its norm, new."""
        ...

    def linear(self, linear: Linear, x: Normed) -> Tensor:
        """[rows, outputs], new."""
        ...

    def gate(self, linear: Linear, x: Normed) -> Tensor:
        """silu(the first half of linear(x)) · the second, [rows, outputs / 2], new."""
        ...

    def linear_add(self, linear: Linear, x: Tensor, to: Tensor) -> None:
        """to [rows, outputs] += linear(x), in place; the sum is rounded to its dtype once."""

    def rope(
        self,
        x: Tensor,
        positions: Tensor,
        angles: Angles,
        out: Tensor,
        also: Tensor | None = None,
        addresses: Tensor | None = None,
    ) -> None:
        """x [rows, heads, head_dim], turned, into `out`, and to all the other places: `rope.rope`."""

    def rope_keys(
        self, k: Tensor, v: Tensor, positions: Tensor, angles: Angles, out: Tensor, kv: Tensor
    ) -> None:
        """K, turned, into `out`, and with V into kv [2, rows, heads, head_dim], which may be host memory."""

    def merge(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensor:
        """Each row's attention to itself and to partials, which may lie in host memory: `decode_merge`."""
        ...

    def direct_merge(
        self, q: Tensor, k: Tensor, v: Tensor, o_at: Tensor, lse_at: Tensor, scale: float
    ) -> Tensor:
        """`merge` of partials by their addresses: `direct.direct_merge`."""
        ...

    def shortlist(self, logits: Tensor, asks: Tensor, out: ShortlistBuffers) -> None:
        """logits float32 [rows, vocab], asks as `out` has them but on the device -> the answers in `out`."""


class TritonOps:
    """`Ops` on a GPU. How products run is what was measured on this card, unless a `choice` is given."""

    def __init__(self, choice: Choice | None = None) -> None:
        from flume_kernels.gpu import decode_merge, direct, rms_norm, rope, shortlist, silu_mul
        from flume_kernels.gpu.linear_tuning import LinearChoice
        from flume_kernels.gpu.tuning import TuningCache, default_path

        self._decode_merge = decode_merge.decode_merge
        self._direct_merge = direct.direct_merge
        self._rms_norm = rms_norm.rms_norm
        self._rope, self._rope_keys = rope.rope, rope.rope_keys
        self._shortlist = shortlist.shortlist
        self._silu_mul = silu_mul.silu_mul
        choice = choice or LinearChoice(TuningCache(default_path()))
        self._products = Products(self.rms_norm, self._silu_of_gate, choice)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._rms_norm(x, weight, out, eps)
        return out

    def linear(self, linear: Linear, x: Normed) -> Tensor:
        return self._products.linear(linear, x)

    def gate(self, linear: Linear, x: Normed) -> Tensor:
        return self._products.gate(linear, x)

    def linear_add(self, linear: Linear, x: Tensor, to: Tensor) -> None:
        self._products.linear_add(linear, x, to)

    def rope(
        self,
        x: Tensor,
        positions: Tensor,
        angles: Angles,
        out: Tensor,
        also: Tensor | None = None,
        addresses: Tensor | None = None,
    ) -> None:
        self._rope(x, positions, angles.cos, angles.sin, out, also, addresses)

    def rope_keys(
        self, k: Tensor, v: Tensor, positions: Tensor, angles: Angles, out: Tensor, kv: Tensor
    ) -> None:
        self._rope_keys(k, v, positions, angles.cos, angles.sin, out, kv)

    def _silu_of_gate(self, gate_up: Tensor) -> Tensor:
        rows, double = gate_up.shape
        out = torch.empty(rows, double // 2, dtype=gate_up.dtype, device=gate_up.device)
        self._silu_mul(gate_up, out)
        return out

    def merge(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._decode_merge(q, k, v, o, lse, out, scale, on_host=o.device.type == "cpu")
        return out

    def direct_merge(
        self, q: Tensor, k: Tensor, v: Tensor, o_at: Tensor, lse_at: Tensor, scale: float
    ) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._direct_merge(q, k, v, o_at, lse_at, out, scale)
        return out

    def shortlist(self, logits: Tensor, asks: Tensor, out: ShortlistBuffers) -> None:
        keys, temperatures, wants = asks[0], asks[1].view(torch.float64), asks[2]
        self._shortlist(logits, keys, temperatures, wants, out.tokens, out.values, out.sums)
