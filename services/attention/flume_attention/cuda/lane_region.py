"""A direct lane's region as the attention node's device sees it: views of its own memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from flume_common.direct_region import ANSWERED_AT, ASKED_AT, DirectRegion
from flume_kernels.dtypes import DTYPES
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LaneRegion:
    """asked_at, answered_at int64 [1]: the flags' addresses, in device memory. queries, o [rows, query_heads,
    head_dim] in the layout's dtype and lse float32 [rows, query_heads] are the region's."""

    asked_at: Tensor
    answered_at: Tensor
    queries: Tensor
    o: Tensor
    lse: Tensor

    @classmethod
    def of(cls, region: DirectRegion, memory: Tensor) -> Self:
        """memory uint8 [at least size_bytes], on its device."""
        rows, heads, dim = region.rows, region.layout.num_query_heads, region.layout.head_dim
        dtype = DTYPES[region.layout.dtype]

        def address(at: int) -> Tensor:
            return torch.tensor([memory.data_ptr() + at], dtype=torch.int64).to(memory.device)

        def view(at: int, row_bytes: int, dtype: torch.dtype, *row: int) -> Tensor:
            return memory[at : at + rows * row_bytes].view(dtype).view(rows, *row)

        return cls(
            address(ASKED_AT),
            address(ANSWERED_AT),
            view(region.queries_at, region.row_bytes, dtype, heads, dim),
            view(region.o_at, region.row_bytes, dtype, heads, dim),
            view(region.lse_at, region.lse_row_bytes, torch.float32, heads),
        )
