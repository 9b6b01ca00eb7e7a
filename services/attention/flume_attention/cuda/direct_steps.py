"""Captured steps of a direct lane: its answers to all layers of a decode step, with no host in between.

    per step     tables, lengths and the step's number to the device, the split of the attention over the chip
    per layer    wait until the weight node's device has asked, attend, say that it is answered

The attention of one layer in the middle is timed, so that the host knows what a step took.

Queries are read, and o and lse written, in the lane's region (`flume_common.direct_region`). A weight node
does not know how its ranges lie here, so there is a step for whatever they look like: see `direct_rows`.

Numbers of rows and tables are rounded up to powers of two, as attention hardly notices rows of nothing. What
is foreseen is captured beforehand: up to twice as many tables as rows, and MOST_PARTS of one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from flume_kernels.gpu.device import Device, Flags, Graph

from flume_attention.cuda.device_pool import DevicePool
from flume_attention.cuda.direct_rows import Rows, Spread, StepRows, Whole
from flume_attention.cuda.lane_region import LaneRegion
from flume_attention.cuda.ops import AttentionOps
from flume_attention.cuda.paging import Segment, cut, segments
from flume_attention.holdings import Row

MOST_PARTS = 4


class Size(NamedTuple):
    """What a captured step is for: so many tables, and so many of one row. 1: rows are whole."""

    tables: int
    parts: int

    @classmethod
    def of(cls, rows: Rows) -> Self:
        parts = max((len(row) for row in rows), default=0)
        if parts <= 1:
            return cls(_power(len(rows)), 1)
        return cls(_power(max(sum(map(len, rows)), len(rows))), max(_power(parts), MOST_PARTS))


@dataclass(slots=True)
class DirectStep:
    rows: StepRows
    graph: Graph
    replays: int = 0

    def launch(self) -> None:
        """Queue a replay. The last one must have ended and the rows be filled."""
        self.replays += 1
        self.graph.launch()


class DirectSteps:
    """Those of one lane, for at most as many rows as its region has and tables of `max_length` tokens.

    `flags` has one gate, which only aborts: a step waits for the other device, or for poison there.
    `captures` counts for good.
    """

    def __init__(
        self, device: Device, ops: AttentionOps, pool: DevicePool, region: LaneRegion, max_length: int
    ) -> None:
        self.flags = Flags(device, gates=1, signals=0)
        self.captures = 0
        self._device = device
        self._ops = ops
        self._pool = pool
        self._region = region
        self._max_rows = len(region.queries)
        self._max_length = max_length
        self._host_number = device.host_tensor(1, dtype=torch.int64)
        self._number = device.tensor(1, dtype=torch.int64)  # of the step
        self._times_ns = device.host_tensor(2, dtype=torch.int64)  # of one layer's attention: begin and end
        self._steps: dict[Size, DirectStep] = {}

    @property
    def attended_s(self) -> float:
        """How long the last step attended, waits left out: one layer's time for all of them."""
        began_ns, ended_ns = self._times_ns.tolist()
        return float(ended_ns - began_ns) / 1e9 * len(self._pool.layers)

    def prepare(self) -> None:
        """Capture what is foreseen. Nothing may run."""
        for at in reversed(range(_power(self._max_rows).bit_length())):  # others use the largest's memory
            self.of(Size(2 << at, MOST_PARTS))
            self.of(Size(1 << at, 1))

    def of(self, size: Size) -> DirectStep:
        """The step of this size; captured if it is the first, when nothing should run."""
        step = self._steps.get(size)
        if step is None:
            step = self._steps[size] = self._capture(size)
        return step

    def fill(self, number: int, asking: Sequence[Row]) -> DirectStep:
        """The step with this number, to be launched. None may run."""
        rows = [self._tables(row) for row in asking]
        step = self.of(Size.of(rows))
        self._host_number.fill_(number)
        step.rows.fill(rows)
        return step

    def _tables(self, row: Row) -> list[Segment]:
        block_tokens = self._pool.layout.block_tokens
        most = self._max_length // block_tokens
        return [part for whole in segments(row.past, block_tokens) for part in cut(whole, most, block_tokens)]

    def _capture(self, size: Size) -> DirectStep:
        rows = self._rows(size)
        # Aborted, no step waits, and none says that it has answered.
        self.flags.host.poison()
        self._device.warm_up(lambda: self._record(rows))
        self.flags.rearm()
        graph = self._device.capture(lambda: self._record(rows))
        self.captures += 1
        return DirectStep(rows, graph)

    def _rows(self, size: Size) -> StepRows:
        common = self._device, self._ops, self._pool, self._region, min(size.tables, self._max_rows)
        if size.parts == 1:
            return Whole(*common, self._max_length)
        return Spread(*common, size.tables, size.parts, self._max_length)

    def _record(self, rows: StepRows) -> None:
        region = self._region
        self._number.copy_(self._host_number, non_blocking=True)
        rows.begin()
        timed = len(self._pool.layers) // 2
        for number, layer in enumerate(self._pool.layers):
            self._device.await_flags(self.flags, region.asked_at, self._number, number)
            if number == timed:
                self._device.stamp(self._times_ns[:1])
            rows.attend(layer)
            if number == timed:
                self._device.stamp(self._times_ns[1:])
            self._device.raise_flags(self.flags, region.answered_at, self._number, number)


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
