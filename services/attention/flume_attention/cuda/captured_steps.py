"""Captured steps of one lane: its answers to all layers of a decode step as one graph.

    per step              tables and lengths to the device, the split of the attention over the chip
    per layer and part    wait for the query, attend, signal the partial

A part is what one microbatch asks of this node. Queries are read where the lane receives them, if there is
one part, and o is written where it sends it: a captured step belongs to the lane. Which frame a message
arrives in depends on all that came before, so the queries of two parts are copied to where the graph reads
them. lse goes into memory of its own, as its place in a message depends on how many queries there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flume_common.wire import MOST_MICROBATCHES
from flume_kernels.dtypes import DTYPES
from flume_kernels.gpu.device import Device, Flags, Graph, capture
from torch import Tensor

from flume_attention.cuda.device_pool import DevicePool
from flume_attention.cuda.ops import AttentionOps
from flume_attention.cuda.paging import Segment


@dataclass(frozen=True, slots=True)
class LaneBuffers:
    """A lane's memory that device code reads and writes: each [tokens, query_heads, head_dim] of the layout's
    dtype, on the host. There is an `o` for every part."""

    queries: Tensor
    o: tuple[Tensor, ...]


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


@dataclass(frozen=True, slots=True)
class CapturedPart:
    """Rows with one query each. queries and o as in LaneBuffers; lse float32 [rows, query_heads], on the
    host."""

    queries: Tensor
    o: Tensor
    lse: Tensor
    tables: StepTables
    plan: Any


@dataclass(slots=True)
class CapturedStep:
    """A step of parts with at most `rows` rows each."""

    rows: int
    parts: tuple[CapturedPart, ...]
    flags: Flags  # one gate and one signal for every part
    graph: Graph
    replays: int = 0

    def launch(self) -> None:
        """Queue a replay. The last one must have ended and the tables be filled."""
        self.replays += 1
        self.graph.launch()


class CapturedSteps:
    """Those of one lane, by the rows and parts they are for. `captures` counts for good."""

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
        self._steps: dict[tuple[int, int], CapturedStep] = {}
        layout, rows = pool.layout, self.most_rows(MOST_MICROBATCHES)
        self._copies = device.host_tensor(
            MOST_MICROBATCHES, rows, layout.num_query_heads, layout.head_dim, dtype=DTYPES[layout.dtype]
        )
        self.captures = 0

    def most_rows(self, parts: int) -> int:
        """Of one part, in a step of so many."""
        return -(-self._max_rows // parts)

    def prepare(self) -> None:
        """Capture all of them now. Nothing may run."""
        # The largest first: others use its memory.
        for parts in range(1, min(MOST_MICROBATCHES, self._max_rows) + 1):
            for bucket in sorted(
                {_bucket(rows) for rows in range(1, self.most_rows(parts) + 1)}, reverse=True
            ):
                self.of(bucket, parts)

    def of(self, rows: int, parts: int = 1) -> CapturedStep:
        """The step for so many rows a part, or a few more; captured if it is the first, when nothing may
        run."""
        bucket = min(_bucket(rows), self.most_rows(parts))
        step = self._steps.get((bucket, parts))
        if step is None:
            step = self._steps[bucket, parts] = self._capture(bucket, parts)
        return step

    def _capture(self, rows: int, count: int) -> CapturedStep:
        parts = tuple(self._part(rows, at, count) for at in range(count))
        flags = Flags(self._device, gates=count, signals=count)
        graph = capture(self._device, flags, lambda: self._record(parts, flags))
        self.captures += 1
        return CapturedStep(rows, parts, flags, graph)

    def _part(self, rows: int, at: int, count: int) -> CapturedPart:
        layout = self._pool.layout
        queries = self._buffers.queries if count == 1 else self._copies[at]
        return CapturedPart(
            queries[:rows],
            self._buffers.o[at][:rows],
            lse=self._device.host_tensor(rows, layout.num_query_heads, dtype=torch.float32),
            tables=StepTables(self._device, rows, layout.blocks_of(self._max_length)),
            plan=self._ops.plan(rows, rows, self._max_length),
        )

    def _record(self, parts: Sequence[CapturedPart], flags: Flags) -> None:
        for part in parts:
            part.tables.copy()
            self._ops.update(part.plan, part.tables.lengths)
        for layer in self._pool.layers:
            for at, part in enumerate(parts):
                self._device.await_(flags, at)
                self._ops.attend(part.plan, part.queries, layer, part.tables.tables, part.o, part.lse)
                self._device.signal(flags, len(parts) + at)


def _bucket(rows: int) -> int:
    """The next power of two up to 8, the next multiple of 8 from there."""
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8
