"""One layer's answer without a graph: any number of queries per row, any number of segments.

Segment s of all rows is attended to at once, rows without one having no keys there; what the segments give is
merged by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flume_kernels.gpu.device import Device
from flume_kernels.gpu.kv_pool import KvPool
from torch import Tensor

from flume_attention.cuda.ops import AttentionOps
from flume_attention.cuda.paging import Segment


@dataclass(frozen=True, slots=True)
class _Part:
    """The s-th segment of every row, planned."""

    plan: Any
    tables: Tensor


class EagerStep:
    """The rows of one step. `rows`: the segments of each and how many queries ask about them."""

    def __init__(
        self,
        device: Device,
        ops: AttentionOps,
        rows: Sequence[tuple[Sequence[Segment], int]],
        where: torch.device,
    ) -> None:
        self._device = device
        self._ops = ops
        self._where = where
        self._tokens = sum(queries for _, queries in rows)
        starts = [0]
        for _, queries in rows:
            starts.append(starts[-1] + queries)
        most = max((len(each) for each, _ in rows), default=0)
        with device.on_stream():
            self._starts = None if all(queries == 1 for _, queries in rows) else self._ints(starts)
            self._parts = [self._part([each for each, _ in rows], at) for at in range(max(most, 1))]

    def attend(self, pool: KvPool, q: Tensor, o: Tensor, lse: Tensor) -> None:
        """q [tokens, query_heads, head_dim] -> o like it, lse float32 [tokens, query_heads]; all of it on the
        host. Waits until they are there."""
        with self._device.on_stream():
            self._queue(pool, q, o, lse)
        self._device.synchronize()

    def _queue(self, pool: KvPool, q: Tensor, o: Tensor, lse: Tensor) -> None:
        there = q.to(self._where, non_blocking=True)
        parts_o = torch.empty(len(self._parts), *q.shape, dtype=q.dtype, device=self._where)
        parts_lse = torch.empty(parts_o.shape[:3], dtype=torch.float32, device=self._where)
        for part, part_o, part_lse in zip(self._parts, parts_o, parts_lse, strict=True):
            self._ops.attend(part.plan, there, pool, part.tables, part_o, part_lse)
        out, out_lse = parts_o[0], parts_lse[0]
        if len(self._parts) > 1:
            out, out_lse = torch.empty_like(out), torch.empty_like(out_lse)
            self._ops.merge(parts_o, parts_lse, out, out_lse)
        o.copy_(out, non_blocking=True)
        lse.copy_(out_lse, non_blocking=True)

    def _part(self, rows: Sequence[Sequence[Segment]], at: int) -> _Part:
        chosen = [each[at] if at < len(each) else Segment([], 0) for each in rows]
        width = max(1, *(len(segment.blocks) for segment in chosen))
        tables = self._ints([segment.blocks + [0] * (width - len(segment.blocks)) for segment in chosen])
        lengths = self._ints([segment.tokens for segment in chosen])
        plan = self._ops.plan(len(rows), self._tokens, max(1, *(segment.tokens for segment in chosen)))
        self._ops.update(plan, lengths, self._starts)
        return _Part(plan, tables)

    def _ints(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).to(self._where)
