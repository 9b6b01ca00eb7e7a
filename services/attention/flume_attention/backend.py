"""What an engine's memory and lanes are made of on its device.

`Backend` is all that the engine asks for; `CpuBackend` is the CPU's, `cuda.backend.GpuBackend` the GPU's.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from flume_common.lanes import Lane
from flume_common.lanes.frames import USUAL, Bytes, Rings, allocate_pages
from flume_common.layout import KvLayout
from flume_common.wire import LaneShape

from flume_attention.holdings import Holdings
from flume_attention.kv_pool import KvPool, Pool
from flume_attention.lane_session import LaneSession
from flume_attention.node import Node


class Backend(Protocol):
    rings: Rings  # of lanes to weight nodes
    compiles: bool  # a lane may need kernels that are not compiled yet

    def pool(self, layout: KvLayout, num_blocks: int) -> Pool:
        """Memory for keys and values. Raises RuntimeError or MemoryError where there is not so much, and
        ValueError for a layout that nothing here can compute with."""
        ...

    def allocate(self, size_bytes: int) -> Bytes:
        """The frames of a lane to a weight node: uint8 [size_bytes], on a page."""
        ...

    def session(
        self,
        node: Node,
        weight_node: str,
        epoch: int,
        lane: Lane[LaneShape],
        holdings: Holdings,
        *,
        direct: bool = False,
        **options: Any,
    ) -> LaneSession:
        """What answers on this lane, options as in LaneSession. The node has its pool. No other lane's step
        may be under way. `direct`: with a region, if that can be."""
        ...


class Threads:
    """How many threads torch uses: few for decode, where one memory stream is the limit, many for prefill.

    Switching costs 0.2 us, waking the others 15 us.
    """

    def __init__(self, few: int, many: int) -> None:
        self._few, self._many = few, max(few, many)
        self._now = few
        torch.set_num_threads(few)

    def use(self, many: bool) -> None:
        wanted = self._many if many else self._few
        if wanted != self._now:
            torch.set_num_threads(wanted)
            self._now = wanted


class CpuBackend:
    """Ordinary memory, and answers computed in the engine's own thread."""

    rings = USUAL
    compiles = False

    def __init__(self, threads: Threads) -> None:
        self._threads = threads

    def pool(self, layout: KvLayout, num_blocks: int) -> Pool:
        return KvPool(layout, num_blocks)

    def allocate(self, size_bytes: int) -> Bytes:
        return allocate_pages(size_bytes)

    def session(
        self,
        node: Node,
        weight_node: str,
        epoch: int,
        lane: Lane[LaneShape],
        holdings: Holdings,
        *,
        direct: bool = False,
        **options: Any,
    ) -> LaneSession:
        session = LaneSession(
            node, weight_node, epoch, lane, holdings, use_threads=self._threads.use, **options
        )
        session.no_region = "this node has no GPU" if direct else ""
        return session
