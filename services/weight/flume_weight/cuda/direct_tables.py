"""Where a direct step's rows and flags lie: what the host writes before a step, and its device reads.

With b rows and P parts, int64; an address is one in a peer's `MappedRegion`, 0 where there is no part:

    queries_at, o_at, lse_at   [P, b]    of one row
    asked_at, answered_at      [P · b]   of one peer's flags: more peers than that cannot be asked
    step                       [1]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flume_common.direct_region import ANSWERED_AT, ASKED_AT
from flume_common.wire import Words
from flume_kernels.gpu.device import Device
from torch import Tensor

from flume_weight.cuda.errors import RouteTooWide
from flume_weight.range_attention import Exchange, Index

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

        Each fills one of a row's parts. Its i-th query is row i of its region. Raises RouteTooWide.
        """
        words = self.words.numpy()
        words[:-1], words[-1] = 0, step
        tables = words[:-1].reshape(_TABLES, self.parts, self.rows)
        asked_at, answered_at = tables[3].reshape(-1), tables[4].reshape(-1)
        taken = np.zeros(self.rows, dtype=np.int64)
        for number, exchange in enumerate(exchanges):
            mapped, rows = exchange.peer.region, _indices(exchange.queries)
            assert mapped is not None
            region, first, at = mapped.region, mapped.address, np.arange(len(rows))
            parts = taken[rows]
            if (widest := int(parts.max()) + 1) > self.parts:
                raise RouteTooWide(widest, self.parts)
            tables[0, parts, rows] = first + region.queries_at + at * region.row_bytes
            tables[1, parts, rows] = first + region.o_at + at * region.row_bytes
            tables[2, parts, rows] = first + region.lse_at + at * region.lse_row_bytes
            asked_at[number], answered_at[number] = first + ASKED_AT, first + ANSWERED_AT
            taken[rows] += 1

    def _table(self, number: int) -> Tensor:
        size = self.parts * self.rows
        return self.words[number * size : (number + 1) * size].view(self.parts, self.rows)


def _indices(rows: Index) -> Words:
    return np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.numpy()
