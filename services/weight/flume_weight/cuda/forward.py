"""Forward passes by captured steps: what the engine calls in place of the model's own for decode batches."""

from __future__ import annotations

from torch import Tensor

from flume_weight.batch import Batch
from flume_weight.cuda.buckets import Buckets
from flume_weight.cuda.captured_steps import CapturedSteps
from flume_weight.cuda.driver import StepDriver, StepTimes
from flume_weight.cuda.errors import StepTimedOut
from flume_weight.cuda.lane_exchange import LaneExchange, widest_route
from flume_weight.cuda.microbatching import Microbatching
from flume_weight.errors import PeerLost
from flume_weight.peer import Peer
from flume_weight.range_attention import RangeAttention, no_answer


class CapturedForward:
    """`attention` sends the PLANs, and is what batches that are not taken run with.

    A pass is `forward`, then `finish`, which commits it on the attention nodes.
    """

    def __init__(
        self,
        steps: CapturedSteps,
        buckets: Buckets,
        driver: StepDriver,
        attention: RangeAttention,
        exchange: LaneExchange,
        microbatching: Microbatching,
    ) -> None:
        self._steps = steps
        self._buckets = buckets
        self._driver = driver
        self._attention = attention
        self._exchange = exchange
        self._microbatching = microbatching
        self.times = StepTimes(0.0, 0.0)  # of the last pass

    def prepare(self) -> None:
        """Capture every size."""
        self._steps.prepare(self._microbatching.sizes(self._buckets))

    def takes(self, batch: Batch) -> bool:
        """Whether a captured step can run this batch: one token a row, on few enough nodes each."""
        rows = len(batch.token_ids)
        return (
            not batch.chunks
            and rows <= self._buckets.rows[-1]
            and widest_route(batch.exchanges, rows) <= self._steps.parts
        )

    def forward(self, number: int, batch: Batch) -> Tensor:
        """Step `number`: float32 logits [R, vocab] of the batch's logit rows, on the device.

        Raises PeerLost, naming a node that did not answer in time, PeerSilent, StepRefused, StepTimedOut when
        all did and the step still did not end, and DeviceStuck.
        """
        rows = len(batch.token_ids)
        size = self._microbatching.size(self._buckets.of(rows), rows)
        step = self._steps.of(size)
        step.buffers.fill(batch.token_ids, batch.positions)
        self._exchange.epoch = self._attention.epoch
        self._exchange.may_leave = self._attention.may_leave
        self._exchange.begin(number, batch.exchanges, step.buffers)
        self._attention.begin(number, batch.exchanges, batch.chunks)
        self._driver.timeout_s = self._attention.timeout_s
        try:
            self.times = self._driver.run(step, self._exchange)
        except StepTimedOut as error:
            if silent := self._exchange.silent:
                raise no_answer(silent[0].node, error.timeout_s) from error
            raise
        self._microbatching.note(size, self.times)
        return step.buffers.logits[batch.logit_rows.to(step.buffers.logits.device)]

    def finish(self) -> list[PeerLost]:
        """Send the last keys. A lane that fails here does not undo the step."""
        return self._exchange.finish(self._attention.timeout_s)

    def forget(self, peer: Peer) -> None:
        """The lane is closed: its frames are not ours any more."""
        self._exchange.forget(peer)
