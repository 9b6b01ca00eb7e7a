"""The dense products of a decode step on a GPU: by `skinny_linear`, in one launch with what is done before
and after, where that was measured to be faster on this card; else by torch, with small operations beside it.

Nothing is measured here, and which way a product goes is settled when a step is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flume_weight.model.linear import Linear

if TYPE_CHECKING:
    from flume_kernels.gpu.linear_tuning import Fusion, LinearProblem
    from flume_kernels.gpu.skinny_linear import SkinnyConfig

Choice = Callable[["LinearProblem", torch.device], "SkinnyConfig | None"]


@dataclass(slots=True)
class Normed:
    """The norm of rows x [rows, hidden], which products may take in as they read x.

    x must stay as it is until the last of them is queued.
    """

    x: Tensor
    weight: Tensor
    eps: float
    by_itself: Tensor | None = None  # once a product needed it so


class Products:
    """For one stream. `norm` computes what a `Normed` stands for, `gate` silu(a) · b of halves [a, b]."""

    def __init__(
        self,
        norm: Callable[[Tensor, Tensor, float], Tensor],
        gate: Callable[[Tensor], Tensor],
        choice: Choice,
    ) -> None:
        from flume_kernels.gpu import linear_tuning, skinny_linear

        self._norm = norm
        self._gate = gate
        self._choice = choice
        self._tuning = linear_tuning
        self._skinny_linear = skinny_linear.skinny_linear
        self._memory = skinny_linear.SplitMemory()

    def linear(self, linear: Linear, x: Normed) -> Tensor:
        outputs = linear.weight.shape[0]
        config = self._config(self._tuning.Fusion.NORM, x.x, outputs)
        return linear(self._by_itself(x)) if config is None else self._normed(config, linear, x, outputs)

    def gate(self, linear: Linear, x: Normed) -> Tensor:
        outputs = linear.weight.shape[0] // 2
        config = self._config(self._tuning.Fusion.GATE, x.x, outputs)
        if config is None:
            return self._gate(linear(self._by_itself(x)))
        return self._normed(config, linear, x, outputs, gated=True)

    def linear_add(self, linear: Linear, x: Tensor, to: Tensor) -> None:
        config = self._config(self._tuning.Fusion.ADD, x, linear.weight.shape[0])
        if config is not None:
            self._skinny_linear(x, linear.weight, to, config, self._memory, bias=linear.bias, add=True)
        elif linear.bias is None:
            to.addmm_(x, linear.weight.T)
        else:
            to.add_(linear(x))

    def _config(self, fusion: Fusion, x: Tensor, outputs: int) -> SkinnyConfig | None:
        rows, inner = x.shape
        return self._choice(self._tuning.LinearProblem(rows, outputs, inner, x.dtype, fusion), x.device)

    def _normed(
        self, config: SkinnyConfig, linear: Linear, x: Normed, outputs: int, gated: bool = False
    ) -> Tensor:
        out = torch.empty(len(x.x), outputs, dtype=x.x.dtype, device=x.x.device)
        self._skinny_linear(
            x.x, linear.weight, out, config, self._memory,
            bias=linear.bias, norm=x.weight, eps=x.eps, gated=gated,
        )  # fmt: skip
        return out

    def _by_itself(self, x: Normed) -> Tensor:
        if x.by_itself is None:
            x.by_itself = self._norm(x.x, x.weight, x.eps)
        return x.by_itself
