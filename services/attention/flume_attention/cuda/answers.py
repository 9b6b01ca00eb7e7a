"""One lane's answers on a GPU, layer by layer, without waiting: ask, then look whether it is answered.

A decode step is a captured one, launched when its PLAN is in: from then on the device waits for queries, and
`ask` only opens its gate. Steps that no graph fits are computed in `ask`.
"""

from __future__ import annotations

import time

import torch
from flume_kernels.gpu.device import Device
from flume_kernels.gpu.flags import Poisoned
from flume_kernels.gpu.watchdog import Watchdog
from torch import Tensor

from flume_attention.cuda.captured_steps import CapturedStep, CapturedSteps, LaneBuffers
from flume_attention.cuda.device_pool import DevicePool
from flume_attention.cuda.eager import EagerStep
from flume_attention.cuda.ops import AttentionOps
from flume_attention.cuda.paging import Segment, segments
from flume_attention.errors import DeviceStuck
from flume_attention.holdings import Step

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
        self._max_rows = max_rows
        self._max_length = max_length
        self._watchdog = watchdog
        self._query_timeout_s = query_timeout_s
        self._captured: CapturedStep | None = None
        self._eager: EagerStep | None = None
        self._queries = 0
        self._lse: Tensor | None = None  # where that of the layer under way belongs
        self._layers_left = 0

    @property
    def busy(self) -> bool:
        """Whether the device works or waits for the host: nobody but its flag will say when it has answered,
        and what else the host asks of it may wait until this step is over."""
        if self._captured is None:
            return self._lse is not None
        return self._layers_left > 0 and not self._captured.flags.host.poisoned

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
            q, o = self._buffers.queries[:queries], self._buffers.o[:queries]
            lse = torch.empty(queries, self._pool.layout.num_query_heads, dtype=torch.float32)
            step = EagerStep(self._device, self._ops, [(some, queries)], self._pool.where)
            step.attend(self._pool.layers[0], q, o, lse)

    def begin(self, step: Step) -> None:
        """A step's PLAN is in, and the memory holds all that its queries ask about."""
        self.end()
        if not step.query_tokens:
            return
        self._device.join()
        self._queries, self._layers_left = step.query_tokens, self._pool.layout.num_layers
        rows = [(segments(row.past, self._pool.layout.block_tokens), row.queries) for row in step.asking]
        if len(rows) <= self._max_rows and all(_is_simple(*row, self._max_length) for row in rows):
            self._captured = self.steps.of(len(rows))
            self._captured.tables.fill([each[0] if each else Segment([], 0) for each, _ in rows])
            self._watch(self._captured)
            self._captured.launch()
        else:
            self._eager = EagerStep(self._device, self._ops, rows, self._pool.where)

    def ask(self, layer: int, lse: Tensor) -> None:
        """The queries of this layer are in the lane's buffer. lse float32 [queries, query_heads] is where
        theirs will be; o will be in the lane's buffer."""
        self._lse = lse
        if self._captured is not None:
            self._watch(self._captured)
            self._captured.flags.host.gates[0].open()
        else:
            assert self._eager is not None, "asked about a step without queries"
            count = self._queries
            q, o = self._buffers.queries[:count], self._buffers.o[:count]
            self._eager.attend(self._pool.layers[layer], q, o, lse)

    def answered(self) -> bool:
        """Whether what was asked is answered now."""
        if self._lse is None:
            return False
        if self._captured is not None:
            try:
                if not self._captured.flags.host.signals[0].take():
                    return False
            except Poisoned:
                self._lse = None
                return False
            self._lse.copy_(self._captured.lse[: self._queries])
        self._lse = None
        self._layers_left -= 1
        return True

    def end(self) -> None:
        """Leave the step under way, complete or not, with the device idle and its flags as new."""
        captured, self._captured, self._eager, self._lse = self._captured, None, None, None
        if captured is None:
            return
        self._watchdog.disarm()
        if self._layers_left:
            captured.flags.host.poison()
        self._drain(captured)
        if captured.flags.host.poisoned:
            captured.flags.rearm()

    def close(self) -> None:
        """As `end`, for good. Raises DeviceStuck."""
        self.end()
        self._watchdog.stop()

    def _watch(self, step: CapturedStep) -> None:
        self._watchdog.arm(self._query_timeout_s, step.flags.host.poison)

    def _drain(self, step: CapturedStep) -> None:
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        while not step.graph.done():
            if time.monotonic() > deadline:
                raise DeviceStuck(DRAIN_TIMEOUT_S)


def _is_simple(row: list[Segment], queries: int, max_length: int) -> bool:
    """Whether a captured step can answer this row: one query, one table that is not too long."""
    return queries == 1 and len(row) <= 1 and sum(segment.tokens for segment in row) <= max_length
