"""Forward passes by captured steps: what the engine calls in place of the model's own for decode batches."""

from __future__ import annotations

from flume_weight.batch import Batch
from flume_weight.cuda.buckets import Buckets, StepSize
from flume_weight.cuda.captured_steps import CapturedSteps
from flume_weight.cuda.direct_exchange import DirectExchange, can_be_direct
from flume_weight.cuda.driver import StepDriver, StepTimes
from flume_weight.cuda.errors import StepTimedOut
from flume_weight.cuda.lane_exchange import LaneExchange, widest_route
from flume_weight.cuda.microbatching import Microbatching
from flume_weight.errors import PeerLost
from flume_weight.peer import Peer
from flume_weight.range_attention import RangeAttention, no_answer
from flume_weight.sampling import Ask, Sampler
from flume_weight.scores import Scores


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
        direct: DirectExchange | None = None,
    ) -> None:
        """`direct`: for batches that may go by the nodes' memory; without it none does."""
        self._steps = steps
        self._buckets = buckets
        self._driver = driver
        self._attention = attention
        self._frames, self._direct = exchange, direct
        self._exchange = exchange  # of the last pass
        self._microbatching = microbatching
        self.times = StepTimes(0.0, 0.0)  # of the last pass

    def prepare(self) -> None:
        """Capture every size, each way that batches may go."""
        self._steps.prepare(self._microbatching.sizes(self._buckets))
        if self._direct is not None:
            self._steps.prepare((StepSize(rows) for rows in self._buckets.rows), direct=True)

    def takes(self, batch: Batch) -> bool:
        """Whether a captured step can run this batch: one token a row, on few enough nodes each."""
        rows = len(batch.token_ids)
        return (
            not batch.chunks
            and rows <= self._buckets.rows[-1]
            and widest_route(batch.exchanges, rows) <= self._steps.parts
        )

    def forward(self, number: int, batch: Batch) -> Scores:
        """Step `number`: the scores of the batch's logit rows, on the device but for shortlists of them.

        Raises PeerLost, naming a node that did not answer in time, PeerSilent, StepRefused, StepTimedOut when
        all did and the step still did not end, and DeviceStuck.
        """
        self._exchange = self._way_of(batch)
        direct = self._exchange is self._direct
        rows = len(batch.token_ids)
        bucket = self._buckets.of(rows)
        size = StepSize(bucket) if direct else self._microbatching.size(bucket, rows)
        step = self._steps.of(size, direct)
        step.buffers.fill(batch.token_ids, batch.positions)
        sampling, asks = batch.logit_rows.tolist(), [_ask(sampler) for sampler in batch.samplers]
        step.buffers.shortlists.ask(sampling, asks)
        self._exchange.epoch = self._attention.epoch
        self._exchange.may_leave = self._attention.may_leave
        self._exchange.begin(number, batch.exchanges, step.buffers)
        self._attention.begin(number, batch.exchanges, batch.chunks, direct)
        self._driver.timeout_s, self._driver.beat = self._attention.timeout_s, self._attention.progress.beat
        try:
            self.times = self._driver.run(step, self._exchange)
        except StepTimedOut as error:
            if silent := self._exchange.silent:
                raise no_answer(silent[0].node, error.timeout_s) from error
            raise
        if not direct:  # whose host sees nothing of how long answers take
            self._microbatching.note(size, self.times)
        logits = step.buffers.logits
        found = step.buffers.shortlists.read(sampling, asks, logits.shape[1])
        return Scores(logits, batch.logit_rows, found)

    def _way_of(self, batch: Batch) -> LaneExchange:
        if self._direct is not None and can_be_direct(batch.exchanges):
            return self._direct
        return self._frames

    def finish(self) -> list[PeerLost]:
        """Send the last keys. A lane that fails here does not undo the step."""
        return self._exchange.finish(self._attention.timeout_s)

    def forget(self, peer: Peer) -> None:
        """The lane is closed: its frames are not ours any more."""
        self._frames.forget(peer)
        if self._direct is not None:
            self._direct.forget(peer)


def _ask(sampler: Sampler) -> Ask | None:
    """What the sampler must know. One that fails gets all logits, and fails again where it fails alone."""
    try:
        return sampler.ask()
    except Exception:
        return None
