"""Where a direct step's rows and flags lie: what the host writes before a step, and its device reads.

With b rows and P parts, int64; an address is one in a peer's `MappedRegion`, 0 where there is no part:

    queries_at, o_at, lse_at   [P, b]    of one row
    asked_at, answered_at      [P · b]   of one peer's flags: more peers than that cannot be asked
    step                       [1]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from flume_common.direct_region import ANSWERED_AT, ASKED_AT
from flume_kernels.gpu.device import Device
from torch import Tensor

from flume_weight.range_attention import Exchange

_TABLES = 5


@dataclass(frozen=True, slots=True)
class DirectTables:
    """All of it in one tensor, so that one copy moves it: int64 [5 · P · b + 1] in host memory."""

    words: Tensor
    parts: int
    rows: int

    @classmethod
    def allocate(cls, device: Device, parts: int, rows: int) -> DirectTables:
        return cls(device.host_tensor(_TABLES * parts * rows + 1, dtype=torch.int64), parts, rows)

    def to(self, where: torch.device) -> DirectTables:
        return DirectTables(self.words.to(where, non_blocking=True), self.parts, self.rows)

    @property
    def queries_at(self) -> Tensor:
        return self._table(0)

    @property
    def o_at(self) -> Tensor:
        return self._table(1)

    @property
    def lse_at(self) -> Tensor:
        return self._table(2)

    @property
    def asked_at(self) -> Tensor:
        return self._table(3).view(-1)

    @property
    def answered_at(self) -> Tensor:
        return self._table(4).view(-1)

    @property
    def step(self) -> Tensor:
        return self.words[-1:]

    def fill(self, step: int, exchanges: Sequence[Exchange]) -> None:
        """Set the step's number and what it asks whom; every node that is asked must have a region.

        Each fills one of a row's parts, of which there must be enough. Its i-th query is row i of its region.
        """
        self.words.zero_()
        self.step[0] = step
        taken = torch.zeros(self.rows, dtype=torch.int64)
        for number, exchange in enumerate(exchanges):
            mapped, rows = exchange.peer.region, exchange.queries
            assert mapped is not None
            region, first, at = mapped.region, mapped.address, torch.arange(exchange.num_queries)
            index = taken[rows], torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
            self.queries_at[index] = first + region.queries_at + at * region.row_bytes
            self.o_at[index] = first + region.o_at + at * region.row_bytes
            self.lse_at[index] = first + region.lse_at + at * region.lse_row_bytes
            self.asked_at[number] = first + ASKED_AT
            self.answered_at[number] = first + ANSWERED_AT
            taken[rows] += 1

    def _table(self, number: int) -> Tensor:
        size = self.parts * self.rows
        return self.words[number * size : (number + 1) * size].view(self.parts, self.rows)
