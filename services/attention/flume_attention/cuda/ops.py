"""The kernels an attention node's answer is made of.

`AttentionOps` is what steps ask for; `TritonAttention` are the kernels of `flume_kernels.gpu`. Each queues on
the current stream and reads nothing on the host. Tests use the kernels' definitions in their place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from flume_common.layout import KvLayout
from flume_kernels.dtypes import DTYPES
from flume_kernels.gpu.kv_pool import KvPool
from torch import Tensor


class AttentionOps(Protocol):
    def plan(self, rows: int, tokens: int, max_length: int) -> Any:
        """Memory for the split of a step of so many rows and queries, for `update` and `attend`."""
        ...

    def update(self, plan: Any, lengths: Tensor, query_starts: Tensor | None = None) -> None:
        """Split the attention of these rows over the chip: `AttentionPlan.update`."""

    def attend(self, plan: Any, q: Tensor, pool: KvPool, tables: Tensor, o: Tensor, lse: Tensor) -> None:
        """One layer of the rows the plan was updated for. q, o and lse may lie in host memory."""

    def merge(self, o: Tensor, lse: Tensor, out: Tensor, out_lse: Tensor) -> None:
        """o [P, T, H, D] and lse [P, T, H] of P parts into one."""

    def append(self, pool: KvPool, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """New tokens of one layer into their slots: `kv_append`."""


class TritonAttention:
    """`AttentionOps` on a GPU, run the way that was found best for its card and this layout.

    For one stream: what it plans for single queries shares memory, 17 MiB of partials for heads of 128 on an
    H200. Raises ValueError for heads of a size that there are no kernels for.
    """

    @dataclass(frozen=True, slots=True)
    class _Plan:
        plan: Any
        config: Any

    def __init__(self, layout: KvLayout, device: torch.device) -> None:
        from flume_kernels.gpu import attention_plan, decode_attention, decode_tuning, kv_append
        from flume_kernels.gpu.merge_partials import merge_partials
        from flume_kernels.gpu.tuning import TuningCache, default_path

        if layout.head_dim not in decode_attention.HEAD_DIMS:
            raise ValueError(
                f"heads of {layout.head_dim} elements; the kernels are for {decode_attention.HEAD_DIMS}"
            )
        self._layout = layout
        self._device = device
        self._problem = decode_tuning.DecodeProblem(
            layout.num_query_heads, layout.num_kv_heads, layout.head_dim, layout.block_tokens,
            DTYPES[layout.dtype],
        )  # fmt: skip
        self._tuned = TuningCache(default_path())
        self._tuning = decode_tuning
        self._plans = attention_plan
        self._attend = decode_attention.decode_attention
        self._lender: Any = None
        self._merge, self._append = merge_partials, kv_append.kv_append

    def plan(self, rows: int, tokens: int, max_length: int) -> Any:
        layout = self._layout
        problem = replace(self._problem, queries=-(-tokens // rows))
        config = self._tuning.decode_config(problem, self._tuned, self._device)
        shape = self._plans.PlanShape(
            rows, tokens, max_length, layout.num_query_heads, layout.num_kv_heads,
            tile_rows=config.tile_rows, tile_keys=config.tile_keys,
            slots=self._tuning.decode_slots(config, self._device),
        )  # fmt: skip
        plan = self._plans.AttentionPlan.allocate(shape, layout.head_dim, self._device, self._lender)
        if tokens == rows and (self._lender is None or len(plan.partial) > len(self._lender.partial)):
            self._lender = plan
        return self._Plan(plan, config)

    def update(self, plan: Any, lengths: Tensor, query_starts: Tensor | None = None) -> None:
        plan.plan.update(lengths, query_starts)

    def attend(self, plan: Any, q: Tensor, pool: KvPool, tables: Tensor, o: Tensor, lse: Tensor) -> None:
        scale, on_host = self._layout.head_dim**-0.5, q.device.type == "cpu"
        self._attend(q, pool, tables, plan.plan, o, lse, scale, plan.config, q_on_host=on_host)

    def merge(self, o: Tensor, lse: Tensor, out: Tensor, out_lse: Tensor) -> None:
        self._merge(o, lse, out, out_lse)

    def append(self, pool: KvPool, k: Tensor, v: Tensor, slots: Tensor) -> None:
        self._append(pool, k, v, slots)
