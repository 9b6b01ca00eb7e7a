"""An attention node's lane whose direct steps are answered in a region of this process.

In the place of a device that waits there: the session looks at the flag whenever it is advanced, and attends
on the CPU. Whoever advances it must look often, as nothing wakes it.
"""

from __future__ import annotations

import torch
from flume_attention.lane_session import LaneSession
from flume_common.direct_region import ANSWERED_AT, ASKED_AT, DirectRegion, mark
from flume_kernels.dtypes import DTYPES
from flume_weight.mapped_region import MappedRegion


def make_region(layout, rows, where):
    """One as a node makes it, but for its rows: they hold NaN."""
    region = DirectRegion(layout, rows)
    memory = torch.full((region.size_bytes,), 0xFF, dtype=torch.uint8, device=where)
    memory[: region.queries_at] = 0
    return MappedRegion(region, memory)


def flag(mapped, at):
    return mapped.memory[at : at + 8].view(torch.int64)


class RegionSession(LaneSession):
    """`stops_at`: a layer that it does not answer, nor any after it."""

    def __init__(self, *args, mapped, **options):
        super().__init__(*args, **options)
        self.stops_at = None
        self.answered_directly = 0  # layers
        self._mapped = mapped
        self._is_direct = False

    def _run_plan(self, plan):
        super()._run_plan(plan)
        self._is_direct = plan.direct

    def _answer(self):
        step = self.holdings.step
        if step is None or not self._is_direct:
            return super()._answer()
        layer, layers = step.answered, self.holdings.shape.layout.num_layers
        if layer == layers or layer == self.stops_at or not step.query_tokens:
            return False
        if int(flag(self._mapped, ASKED_AT).cpu()) < mark(step.number, layer):
            return False
        self._attend_there(step.parts[0], layer)
        flag(self._mapped, ANSWERED_AT).fill_(mark(step.number, layer))
        step.answered += 1
        self.answered_directly += 1
        return True

    def _attend_there(self, part, layer):
        region, rows, layout = self._mapped.region, part.query_tokens, self.holdings.shape.layout
        size, dtype = (rows, layout.num_query_heads, layout.head_dim), DTYPES[layout.dtype]
        q = self._rows(region.queries_at, region.row_bytes, rows).view(dtype).view(size)
        o, lse = torch.empty(size, dtype=dtype), torch.empty(size[:2])
        self._attend(part, layer, q.cpu(), o, lse)
        self._rows(region.o_at, region.row_bytes, rows).view(dtype).view(size).copy_(o)
        self._rows(region.lse_at, region.lse_row_bytes, rows).view(torch.float32).view(size[:2]).copy_(lse)

    def _rows(self, at, row_bytes, rows):
        return self._mapped.memory[at : at + rows * row_bytes]
