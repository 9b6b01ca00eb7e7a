"""The memory of a node's keys and values. On a CPU: one tensor, cut into runs of tokens.

Heads come before tokens, so that the keys of one head lie next to each other for as long as a run lasts
and attention reads them in place. `blocks` and `ranges` decide what lies where; nothing here checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from flume_common.layout import KvLayout
from flume_kernels.dtypes import DTYPES
from flume_kernels.partial_attention import KvRun
from torch import Tensor

from flume_attention.ranges import Run


class Pool(Protocol):
    """The memory of a node's keys and values on whatever device."""

    @property
    def layout(self) -> KvLayout: ...

    @property
    def num_blocks(self) -> int: ...

    def read(self, first_layer: int, runs: Sequence[Run], out: Tensor) -> None:
        """Copy what lies in `runs`, in order, to out [layers, 2, tokens, kv_heads, head_dim] in host
        memory."""

    def write(self, first_layer: int, kv: Tensor, targets: Sequence[Run]) -> None:
        """Put kv [layers, 2, tokens, kv_heads, head_dim], in host memory, where `targets`, in order, say.
        It may be reused at once."""


MakePool = Callable[[KvLayout, int], Pool]
"""Room for so many blocks. Raises RuntimeError or MemoryError where there is not so much."""


class KvPool:
    """Room for `num_blocks` blocks: [layers, 2, kv_heads, tokens, head_dim], K at 0 and V at 1."""

    def __init__(self, layout: KvLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        # Left untouched: the kernel hands out pages as tokens come. Touching all of them first takes
        # 0.3 to 2.3 s/GiB; as tokens come, 0.2 ms per new block of SmolLM2-135M in float32.
        self._tensor = torch.empty(
            layout.num_layers, 2, layout.num_kv_heads, num_blocks * layout.block_tokens, layout.head_dim,
            dtype=DTYPES[layout.dtype],
        )  # fmt: skip

    def layers_of(self, runs: Sequence[Run]) -> list[tuple[KvRun, ...]]:
        """Keys and values of `runs` in every layer, each [kv_heads, run.tokens, head_dim], no copies.

        Made once per row and step: 20 us for 30 layers, where slicing layer by layer costs 130.
        """
        per_run = [self._tensor.narrow(3, run.first, run.tokens).flatten(0, 1).unbind(0) for run in runs]
        return [
            tuple(KvRun(views[2 * layer], views[2 * layer + 1]) for views in per_run)
            for layer in range(self.layout.num_layers)
        ]

    def read(self, first_layer: int, runs: Sequence[Run], out: Tensor) -> None:
        """Copy what lies in `runs`, in order, to out [layers, 2, tokens, kv_heads, head_dim]."""
        target = out.transpose(2, 3)
        layers = self._tensor.narrow(0, first_layer, out.shape[0])
        at = 0
        for run in runs:
            target.narrow(3, at, run.tokens).copy_(layers.narrow(3, run.first, run.tokens))
            at += run.tokens

    def write(self, first_layer: int, kv: Tensor, targets: Sequence[Run]) -> None:
        """Put kv [layers, 2, tokens, kv_heads, head_dim] where `targets`, in order, say.

        One copy per run: half the time of one indexed copy, for one run and for eight alike.
        """
        source = kv.transpose(2, 3)
        layers = self._tensor.narrow(0, first_layer, kv.shape[0])
        at = 0
        for run in targets:
            layers.narrow(3, run.first, run.tokens).copy_(source.narrow(3, at, run.tokens))
            at += run.tokens
