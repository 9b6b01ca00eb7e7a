"""The rows of a captured direct step: what of them lies where, and one layer's attention of all of them.

Whole     each row's past is one table: a row of the attention is a row of the region
Spread    it is any number of tables. They are attended to side by side, each with its row's query, and
          what belongs to one row is merged into its place
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from flume_kernels.gpu.device import Device
from flume_kernels.gpu.kv_pool import KvPool
from torch import Tensor

from flume_attention.cuda.captured_steps import StepTables
from flume_attention.cuda.device_pool import DevicePool
from flume_attention.cuda.lane_region import LaneRegion
from flume_attention.cuda.ops import AttentionOps
from flume_attention.cuda.paging import Segment

Rows = Sequence[Sequence[Segment]]  # the segments of each row that asks


class StepRows(Protocol):
    def fill(self, rows: Rows) -> None:
        """The next step's, on the host. No step may run."""

    def begin(self) -> None:
        """Queue what a step starts with: copies to the device, and the split of the attention."""

    def attend(self, layer: KvPool) -> None:
        """Queue one layer: from the region's queries to its o and lse."""


class Whole:
    """At most `rows` rows, of one table or none."""

    def __init__(
        self, device: Device, ops: AttentionOps, pool: DevicePool, region: LaneRegion, rows: int, length: int
    ) -> None:
        self._ops = ops
        self._region = region
        self._rows = rows
        self._tables = StepTables(device, rows, pool.layout.blocks_of(length))
        self._plan = ops.plan(rows, rows, length)

    def fill(self, rows: Rows) -> None:
        self._tables.fill([row[0] if row else Segment([], 0) for row in rows])

    def begin(self) -> None:
        self._tables.copy()
        self._ops.update(self._plan, self._tables.lengths)

    def attend(self, layer: KvPool) -> None:
        region, rows = self._region, self._rows
        tables = self._tables.tables
        self._ops.attend(self._plan, region.queries[:rows], layer, tables, region.o[:rows], region.lse[:rows])


class Spread:
    """At most `rows` rows of at most `parts` tables each, `tables` in all."""

    def __init__(
        self, device: Device, ops: AttentionOps, pool: DevicePool, region: LaneRegion,
        rows: int, tables: int, parts: int, length: int,
    ) -> None:  # fmt: skip
        self._ops = ops
        self._region = region
        self._rows, self._parts, self._none = rows, parts, tables
        self._tables = StepTables(device, tables, pool.layout.blocks_of(length))
        self._plan = ops.plan(tables, tables, length)
        heads, dim = region.queries.shape[1:]
        # One more than there are tables, never written: what a row has in place of parts that it has not.
        self._o = device.tensor(tables + 1, heads, dim, dtype=region.o.dtype)
        self._lse = device.tensor(tables + 1, heads, dtype=torch.float32).fill_(-torch.inf)
        self._query_of = _Indices(device, tables)
        self._part_of = _Indices(device, parts * rows)

    def fill(self, rows: Rows) -> None:
        self._tables.fill([segment for row in rows for segment in row])
        query_of, part_of = self._query_of.host, self._part_of.host.view(self._parts, self._rows)
        query_of.zero_()
        part_of.fill_(self._none)
        at = 0
        for number, row in enumerate(rows):
            query_of[at : at + len(row)] = number
            part_of[: len(row), number] = torch.arange(at, at + len(row))
            at += len(row)

    def begin(self) -> None:
        self._tables.copy()
        self._query_of.copy()
        self._part_of.copy()
        self._ops.update(self._plan, self._tables.lengths)

    def attend(self, layer: KvPool) -> None:
        region, rows, tables = self._region, self._rows, self._none
        queries = region.queries.index_select(0, self._query_of.there)
        self._ops.attend(
            self._plan, queries, layer, self._tables.tables, self._o[:tables], self._lse[:tables]
        )
        parts_o = self._o.index_select(0, self._part_of.there).view(self._parts, rows, *self._o.shape[1:])
        parts_lse = self._lse.index_select(0, self._part_of.there).view(self._parts, rows, -1)
        self._ops.merge(parts_o, parts_lse, region.o[:rows], region.lse[:rows])


class _Indices:
    """int64 [count] that the host fills and a step copies."""

    def __init__(self, device: Device, count: int) -> None:
        self.host = device.host_tensor(count, dtype=torch.int64)
        self.there: Tensor = device.tensor(count, dtype=torch.int64)

    def copy(self) -> None:
        self.there.copy_(self.host, non_blocking=True)
