"""A fake weight node that asks in a region of device memory, as a weight node's device does."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from fake_weight_node import FakeWeightNode
from flume_attention.cuda.lane_region import LaneRegion
from flume_common.direct_region import ANSWERED_AT, ASKED_AT, DirectRegion, mark


@dataclass
class DirectWeightNode(FakeWeightNode):
    """Rows of one query are asked about in the region once it is given, all others by messages."""

    memory: torch.Tensor | None = None  # of the region
    rows: int = 8

    def asks_directly(self, rows) -> bool:
        queries = [row[1] for row in rows]
        self.is_direct = self.memory is not None and any(queries) and max(queries) == 1
        return self.is_direct

    def query(self, number, layer, q, microbatch=0):
        if not self.is_direct:
            super().query(number, layer, q, microbatch)
            return
        self._region.queries[: len(q)] = q.to(self.memory.device)
        self._flag(ASKED_AT).fill_(mark(number, layer))

    def partial(self, number, layer, tokens, microbatch=0):
        if not self.is_direct:
            return super().partial(number, layer, tokens, microbatch)
        until = time.monotonic() + self.timeout_s
        while self.answered < mark(number, layer):
            assert time.monotonic() < until, f"layer {layer} is not answered within {self.timeout_s} s"
            self.port.progress()
            time.sleep(0.0005)
        assert self.answered == mark(number, layer), "a layer was answered that nobody asked about"
        return self._region.o[:tokens].cpu(), self._region.lse[:tokens].cpu()

    @property
    def answered(self) -> int:
        return int(self._flag(ANSWERED_AT))

    def _flag(self, at):
        return self.memory[at : at + 8].view(torch.int64)

    @property
    def _region(self):
        return LaneRegion.of(DirectRegion(self.shape.layout, self.rows), self.memory)
