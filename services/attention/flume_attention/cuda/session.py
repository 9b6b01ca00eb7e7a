"""A lane seen from an attention node on a GPU: the same state machine, with answers that take a while.

The lane has one QUERY and one PARTIAL frame, in host memory that the device sees, as captured steps read and
write at fixed addresses. That is enough: a weight node asks about a layer when it has the answer to the one
before.
"""

from __future__ import annotations

import time
from typing import Any

from flume_common.lanes import Lane
from flume_common.wire import Header, Kind, LaneShape, Plan

from flume_attention.cuda.answers import Answers
from flume_attention.cuda.captured_steps import LaneBuffers
from flume_attention.cuda.direct_answers import DirectAnswers
from flume_attention.errors import ProtocolError
from flume_attention.frame_tensors import FrameTensors
from flume_attention.holdings import Step
from flume_attention.lane_session import LaneSession

RINGS = {Kind.QUERY: 1, Kind.PARTIAL: 1}


class GpuLaneSession(LaneSession):
    """Raises DeviceStuck from `advance`, too."""

    def __init__(
        self, *args: Any, answers: Answers, direct: DirectAnswers | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._answers = answers
        self._direct = direct
        self._asked_directly = False  # about the step under way
        self._asked_s: float | None = None  # when, while a layer is asked about

    @property
    def busy(self) -> bool:
        return self._answers.busy

    @property
    def under_way(self) -> bool:
        return self.busy or (self._direct is not None and self._direct.under_way)

    def close(self) -> None:
        """Leave the device idle. Raises DeviceStuck."""
        if self._direct is not None:
            self._direct.end()
        self._answers.close()

    def _run_plan(self, plan: Plan) -> None:
        self._answers.end()
        if self._direct is not None:
            self._direct.end()
        self._asked_s, self._asked_directly = None, plan.direct
        super()._run_plan(plan)
        step = self.holdings.step
        if step is None or not len(plan.rows):
            return
        if plan.direct:
            self._begin_direct(step)
        else:
            self._answers.begin(step)

    def _begin_direct(self, step: Step) -> None:
        if self._direct is None or any(row.queries != 1 for row in step.asking):
            raise ProtocolError(f"step {step.number}: rows that cannot be asked about in this lane's region")
        if step.asking:
            self._direct.begin(step)
            # No PARTIAL will say that we are there; a weight node that gave us up as silent waits for a word.
            self.credit_due = True

    def _answer(self) -> bool:
        if self._direct is not None and self._direct.over():
            assert self.holdings.step is not None
            self.holdings.step.layers_answered = self.holdings.shape.layout.num_layers
            return True
        frame = self._queries.peek()
        step = self._step_of(frame, self._queries) if frame is not None else None
        if frame is None or step is None:
            return False
        if self._asked_directly:
            raise ProtocolError(f"step {step.number}: QUERY of a step that is asked about in the region")
        answer = self._partials.frame()
        if answer is None:
            return False
        if self._asked_s is None:
            self._require_query(step, frame)
            _, lse = self._tensors.partial(answer, step.query_tokens)
            self._answers.ask(step.layers_answered, lse)
            self._asked_s = time.perf_counter()
        if not self._answers.answered():
            return False
        self._attended_s += time.perf_counter() - self._asked_s
        self._asked_s = None
        self._queries.drop()  # before the answer goes out: the next query may follow at once
        header = answer.header
        header[Header.STEP], header[Header.LAYER] = step.number, step.layers_answered
        header[Header.EPOCH] = self._node_epoch
        self._partials.send(answer, self._tensors.partial_bytes(step.query_tokens))
        step.layers_answered += 1
        if step.layers_answered == self.holdings.shape.layout.num_layers:
            self._note_reads(step)
        return True


def lane_buffers(tensors: FrameTensors, lane: Lane[LaneShape], tokens: int) -> LaneBuffers:
    """The two frames of a lane with `RINGS` as a captured step sees them; `tokens` is the most of a step."""
    (queries,), (partial,) = lane.receiver(Kind.QUERY).frames, lane.sender(Kind.PARTIAL).frames
    return LaneBuffers(tensors.queries(queries, tokens), tensors.queries(partial, tokens))
