"""Captured steps of one lane: its answers to all layers of a decode step as one graph.

    per step     tables and lengths to the device, the split of the attention over the chip
    per layer    wait for the query, attend, signal the partial

Queries are read where the lane receives them and o is written where it sends it: a captured step belongs to
the lane. lse goes into memory of its own, as its place in a message depends on how many queries there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flume_kernels.gpu.device import Device, Flags, Graph, capture
from torch import Tensor

from flume_attention.cuda.device_pool import DevicePool
from flume_attention.cuda.ops import AttentionOps
from flume_attention.cuda.paging import Segment


@dataclass(frozen=True, slots=True)
class LaneBuffers:
    """A lane's memory that device code reads and writes: each [tokens, query_heads, head_dim] of the layout's
    dtype, on the host."""

    queries: Tensor
    o: Tensor


class StepTables:
    """Block tables int32 [rows, blocks] and lengths int32 [rows] of a step, filled on the host."""

    def __init__(self, device: Device, rows: int, max_blocks: int) -> None:
        self._host = device.host_tensor(rows, max_blocks, dtype=torch.int32)
        self._host_lengths = device.host_tensor(rows, dtype=torch.int32)
        self.tables = device.tensor(rows, max_blocks, dtype=torch.int32)
        self.lengths = device.tensor(rows, dtype=torch.int32)

    def fill(self, rows: Sequence[Segment]) -> None:
        """The next step's rows; those beyond hold nothing. No step may run."""
        self._host_lengths.zero_()
        for at, segment in enumerate(rows):
            self._host[at, : len(segment.blocks)] = torch.tensor(segment.blocks, dtype=torch.int32)
            self._host_lengths[at] = segment.tokens

    def copy(self) -> None:
        """Queue the copy to the device."""
        self.tables.copy_(self._host, non_blocking=True)
        self.lengths.copy_(self._host_lengths, non_blocking=True)


@dataclass(slots=True)
class CapturedStep:
    """A step of at most `rows` rows with one query each. lse float32 [rows, query_heads], on the host."""

    rows: int
    tables: StepTables
    lse: Tensor
    flags: Flags  # one gate, one signal
    graph: Graph
    replays: int = 0

    def launch(self) -> None:
        """Queue a replay. The last one must have ended and the tables be filled."""
        self.replays += 1
        self.graph.launch()


class CapturedSteps:
    """Those of one lane, by the rows they are for. `captures` counts for good."""

    def __init__(
        self,
        device: Device,
        ops: AttentionOps,
        pool: DevicePool,
        buffers: LaneBuffers,
        max_rows: int,
        max_length: int,
    ) -> None:
        self._device = device
        self._ops = ops
        self._pool = pool
        self._buffers = buffers
        self._max_rows = max_rows
        self._max_length = max_length  # tokens of one row
        self._steps: dict[int, CapturedStep] = {}
        self.captures = 0

    def prepare(self) -> None:
        """Capture all of them now. Nothing may run."""
        # The largest first: others use its memory.
        for bucket in sorted({_bucket(rows) for rows in range(1, self._max_rows + 1)}, reverse=True):
            self.of(bucket)

    def of(self, rows: int) -> CapturedStep:
        """The step for so many rows or a few more; captured if it is the first, when nothing may run."""
        bucket = min(_bucket(rows), self._max_rows)
        step = self._steps.get(bucket)
        if step is None:
            step = self._steps[bucket] = self._capture(bucket)
        return step

    def _capture(self, rows: int) -> CapturedStep:
        layout = self._pool.layout
        tables = StepTables(self._device, rows, layout.blocks_of(self._max_length))
        lse = self._device.host_tensor(rows, layout.num_query_heads, dtype=torch.float32)
        flags = Flags(self._device, gates=1, signals=1)
        plan = self._ops.plan(rows, rows, self._max_length)
        graph = capture(self._device, flags, lambda: self._record(rows, tables, lse, flags, plan))
        self.captures += 1
        return CapturedStep(rows, tables, lse, flags, graph)

    def _record(self, rows: int, tables: StepTables, lse: Tensor, flags: Flags, plan: Any) -> None:
        queries, o = self._buffers.queries[:rows], self._buffers.o[:rows]
        tables.copy()
        self._ops.update(plan, tables.lengths)
        for layer in self._pool.layers:
            self._device.await_(flags, 0)
            self._ops.attend(plan, queries, layer, tables.tables, o, lse)
            self._device.signal(flags, 1)


def _bucket(rows: int) -> int:
    """The next power of two up to 8, the next multiple of 8 from there."""
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8
