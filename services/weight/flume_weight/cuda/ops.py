"""The small operations of a decode step, between the projections.

`Ops` is what `decode_step` asks for; `TritonOps` are the kernels of `flume_kernels.gpu`. Each queues on the
current stream and reads nothing on the host. Tests use the kernels' definitions in their place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flume_weight.model.config import ModelConfig
from flume_weight.model.rope import inverse_frequencies


@dataclass(frozen=True, slots=True)
class Angles:
    """cos and sin float32 [context, head_dim / 2] of every position."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, config: ModelConfig, device: torch.device) -> Angles:
        positions = torch.arange(config.context_tokens, dtype=torch.float32)
        angles = positions[:, None] * inverse_frequencies(config)
        return cls(angles.cos().to(device), angles.sin().to(device))


class Ops(Protocol):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        """x [rows, size] -> its norm, new; with a residual, that of residual += x."""
        ...

    def rope(self, x: Tensor, positions: Tensor, angles: Angles, out: Tensor) -> None:
        """x [rows, heads, head_dim], turned, into `out`, which may be host memory."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up [rows, 2 · size] -> [rows, size], new."""
        ...

    def merge(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensor:
        """Each row's attention to itself and to partials, which may lie in host memory: `decode_merge`."""
        ...

    def push(self, q: Tensor, queries_at: Tensor) -> None:
        """Rows of q to the addresses of a table: `direct.push`."""

    def direct_merge(
        self, q: Tensor, k: Tensor, v: Tensor, o_at: Tensor, lse_at: Tensor, scale: float
    ) -> Tensor:
        """`merge` of partials by their addresses: `direct.direct_merge`."""
        ...


class TritonOps:
    """`Ops` on a GPU."""

    def __init__(self) -> None:
        from flume_kernels.gpu import decode_merge, direct, rms_norm, rope, silu_mul

        self._decode_merge = decode_merge.decode_merge
        self._push = direct.push
        self._direct_merge = direct.direct_merge
        self._rms_norm = rms_norm.rms_norm
        self._rope = rope.rope
        self._silu_mul = silu_mul.silu_mul

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._rms_norm(x, weight, out, eps, residual)
        return out

    def rope(self, x: Tensor, positions: Tensor, angles: Angles, out: Tensor) -> None:
        self._rope(x, positions, angles.cos, angles.sin, out)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows, double = gate_up.shape
        out = torch.empty(rows, double // 2, dtype=gate_up.dtype, device=gate_up.device)
        self._silu_mul(gate_up, out)
        return out

    def merge(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._decode_merge(q, k, v, o, lse, out, scale, on_host=o.device.type == "cpu")
        return out

    def push(self, q: Tensor, queries_at: Tensor) -> None:
        self._push(q, queries_at)

    def direct_merge(
        self, q: Tensor, k: Tensor, v: Tensor, o_at: Tensor, lse_at: Tensor, scale: float
    ) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._direct_merge(q, k, v, o_at, lse_at, out, scale)
        return out
