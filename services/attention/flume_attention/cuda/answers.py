"""One lane's answers on a GPU, layer by layer, without waiting: ask, then look whether it is answered.

A decode step is a captured one, launched when its PLAN is in: from then on the device waits for queries, and
`ask` only opens a gate. Steps that no graph fits are computed in `ask`. Whatever a step's parts are, they are
asked about in turn, layer by layer, and answered in that order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch
from flume_kernels.gpu.device import Device, Graph
from flume_kernels.gpu.flags import Poisoned
from flume_kernels.gpu.watchdog import Watchdog
from torch import Tensor

from flume_attention.cuda.captured_steps import CapturedStep, CapturedSteps, LaneBuffers
from flume_attention.cuda.device_pool import DevicePool
from flume_attention.cuda.eager import EagerStep
from flume_attention.cuda.ops import AttentionOps
from flume_attention.cuda.paging import Segment, segments
from flume_attention.errors import DeviceStuck
from flume_attention.holdings import Row, Step

DRAIN_TIMEOUT_S = 5.0
MANY_QUERIES = 512
QUERY_TIMEOUT_S = 30.0  # longer than any weight node waits for its other attention nodes


class Answers:
    """`buffers` are the lane's; the device's stream is used by no other lane. At most `max_rows` rows are
    captured, of at most `max_length` tokens each.

    A captured step that is not asked about its next layer within `query_timeout_s` is released by the
    watchdog, which ends with this object, and stays without further answers until `end`: its engine may be
    stuck, and the device must not be. `begin` and `end` may raise DeviceStuck.
    """

    def __init__(
        self,
        device: Device,
        ops: AttentionOps,
        pool: DevicePool,
        buffers: LaneBuffers,
        *,
        max_rows: int,
        max_length: int,
        watchdog: Watchdog,
        query_timeout_s: float = QUERY_TIMEOUT_S,
    ) -> None:
        self.steps = CapturedSteps(device, ops, pool, buffers, max_rows, max_length)
        self._device = device
        self._ops = ops
        self._pool = pool
        self._buffers = buffers
        self._max_length = max_length
        self._watchdog = watchdog
        self._query_timeout_s = query_timeout_s
        self._captured: CapturedStep | None = None
        self._eager: list[EagerStep] = []  # by part
        self._pending: deque[tuple[int, Tensor]] = deque()  # part, and where its lse belongs
        self._left = 0  # answers to give

    @property
    def busy(self) -> bool:
        """Whether the device works or waits for the host: nobody but its flag will say when it has answered,
        and what else the host asks of it may wait until this step is over."""
        if self._captured is None:
            return bool(self._pending)
        return self._left > 0 and not self._captured.flags.host.poisoned

    @property
    def reads_lane(self) -> bool:
        """Whether the device reads queries from the lane's buffer until they are answered. Otherwise it is
        free again after `ask`."""
        return self._captured is not None and len(self._captured.parts) == 1

    def prepare(self) -> None:
        """Capture every step, and load what others are made of, so that no step waits for it. Nothing may
        run, on any lane: making memory and loading kernels may wait for all of a device. Takes seconds where
        kernels are not in Triton's cache yet."""
        self.steps.prepare()
        self._load_eager()
        self._pool.load()

    def _load_eager(self) -> None:
        """Once with one query a row, once with many, with two segments each: what chunks launch."""
        some = [Segment([0], 1), Segment([0], 1)]
        for queries in (1, min(MANY_QUERIES, len(self._buffers.queries))):
            q, o = self._buffers.queries[:queries], self._buffers.o[0][:queries]
            lse = torch.empty(queries, self._pool.layout.num_query_heads, dtype=torch.float32)
            step = EagerStep(self._device, self._ops, [(some, queries)], self._pool.where)
            step.attend(self._pool.layers[0], q, o, lse)

    def begin(self, step: Step) -> None:
        """A step's PLAN is in, and the memory holds all that its queries ask about."""
        self.end()
        if not step.parts:
            return
        self._device.join()
        self._left = len(step.parts) * self._pool.layout.num_layers
        parts = [self._segments(part.asking) for part in step.parts]
        if all(self._is_simple(rows, len(parts)) for rows in parts):
            self._captured = self.steps.of(max(len(rows) for rows in parts), len(parts))
            for captured, rows in zip(self._captured.parts, parts, strict=True):
                captured.tables.fill([each[0] if each else Segment([], 0) for each, _ in rows])
            self._watch(self._captured)
            self._captured.launch()
        else:
            self._eager = [EagerStep(self._device, self._ops, rows, self._pool.where) for rows in parts]

    def _segments(self, asking: Sequence[Row]) -> list[tuple[list[Segment], int]]:
        return [(segments(row.past, self._pool.layout.block_tokens), row.queries) for row in asking]

    def _is_simple(self, rows: Sequence[tuple[list[Segment], int]], parts: int) -> bool:
        """Whether a captured step can answer this part: one query a row, one table that is not too long."""
        return len(rows) <= self.steps.most_rows(parts) and all(
            queries == 1 and len(row) <= 1 and sum(segment.tokens for segment in row) <= self._max_length
            for row, queries in rows
        )

    def ask(self, part: int, layer: int, queries: Tensor, lse: Tensor) -> None:
        """The queries of this part and layer are in the lane's buffer, as `queries` [queries, query_heads,
        head_dim]. lse float32 [queries, query_heads] is where theirs will be; o will be in the part's."""
        self._pending.append((part, lse))
        if self._captured is None:
            o = self._buffers.o[part][: len(queries)]
            self._eager[part].attend(self._pool.layers[layer], queries, o, lse)
            return
        if not self.reads_lane:
            self._captured.parts[part].queries[: len(queries)].copy_(queries)
        self._watch(self._captured)
        self._captured.flags.host.gates[part].open()

    def answered(self) -> bool:
        """Whether the oldest of what was asked is answered now; then it is no longer asked."""
        if not self._pending:
            return False
        part, lse = self._pending[0]
        if self._captured is not None:
            try:
                if not self._captured.flags.host.signals[part].take():
                    return False
            except Poisoned:
                self._pending.clear()
                return False
            lse.copy_(self._captured.parts[part].lse[: len(lse)])
        self._pending.popleft()
        self._left -= 1
        return True

    def end(self) -> None:
        """Leave the step under way, complete or not, with the device idle and its flags as new."""
        captured, self._captured, self._eager = self._captured, None, []
        self._pending.clear()
        if captured is None:
            return
        self._watchdog.disarm()
        if self._left:
            captured.flags.host.poison()
        drain(captured.graph)
        if captured.flags.host.poisoned:
            captured.flags.rearm()

    def close(self) -> None:
        """As `end`, for good. Raises DeviceStuck."""
        self.end()
        self._watchdog.stop()

    def _watch(self, step: CapturedStep) -> None:
        self._watchdog.arm(self._query_timeout_s, step.flags.host.poison)


def drain(graph: Graph) -> None:
    """Wait for the end of what was released. Raises DeviceStuck."""
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    while not graph.done():
        if time.monotonic() > deadline:
            raise DeviceStuck(DRAIN_TIMEOUT_S)
