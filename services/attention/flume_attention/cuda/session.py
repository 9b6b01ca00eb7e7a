"""A lane seen from an attention node on a GPU: the same state machine, with answers that take a while.

The lane has one QUERY frame, and one PARTIAL frame for each microbatch, in host memory that the device sees,
as captured steps read and write at fixed addresses. That is enough: a weight node asks about a layer of a
microbatch when it has the answer to the one before, and with two of them queries are copied on arrival.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from flume_common.lanes import Frame, Lane
from flume_common.wire import MOST_MICROBATCHES, Kind, LaneShape, Plan

from flume_attention.cuda.answers import Answers
from flume_attention.cuda.captured_steps import LaneBuffers
from flume_attention.cuda.direct_answers import DirectAnswers
from flume_attention.errors import ProtocolError
from flume_attention.frame_tensors import FrameTensors
from flume_attention.holdings import Step
from flume_attention.lane_session import LaneSession

ALIVE_EVERY_S = 0.5
"""A direct step that lasts longer than this says so: no PARTIAL does, and a weight node asks nothing more of
a node that it has given up as silent."""
RINGS = {Kind.QUERY: 1, Kind.PARTIAL: MOST_MICROBATCHES}


class GpuLaneSession(LaneSession):
    """Raises DeviceStuck from `advance`, too."""

    def __init__(
        self, *args: Any, answers: Answers, direct: DirectAnswers | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._answers = answers
        self._direct = direct
        self._asked_directly = False  # about the step under way
        self._alive_at_s = 0.0  # when it begun, or we last said that we are there
        self._frames = self.lane.sender(Kind.PARTIAL).frames  # by part
        self._asked: deque[tuple[Frame, float]] = deque()  # where answers belong, and when it was asked
        self._answered_s = 0.0

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
        self._asked.clear()
        self._asked_directly = plan.direct
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
        self.direct = True
        if step.asking:
            self._direct.begin(step)
            self._alive_at_s = time.monotonic()

    def _answer(self) -> bool:
        return self._end_direct() or self._send_answer() or self._take_query()

    def _end_direct(self) -> bool:
        """Whether a direct step has just been answered, all of it."""
        if self._direct is None:
            return False
        if not self._direct.over():
            self._say_alive(self._direct)
            return False
        step = self.holdings.step
        assert step is not None
        step.asked = step.answered = len(step.parts) * self.holdings.shape.layout.num_layers
        self._attended_s = self._direct.steps.attended_s
        self._note_reads(step)
        return True

    def _say_alive(self, direct: DirectAnswers) -> None:
        now_s = time.monotonic()
        if now_s - self._alive_at_s >= ALIVE_EVERY_S and direct.under_way:
            self._alive_at_s, self.credit_due = now_s, True

    def _take_query(self) -> bool:
        frame = self._queries.peek()
        step = self._step_of(frame, self._queries) if frame is not None else None
        if frame is None or step is None or step.all_asked:
            return False
        if self._asked_directly:
            raise ProtocolError(f"step {step.number}: QUERY of a step that is asked about in the region")
        layer, part = self._require_query(step, frame)
        at = step.parts.index(part)
        answer = self._partials.frame(self._frames[at])
        if answer is None:
            return False
        _, lse = self._tensors.partial(answer, part.query_tokens)
        self._answers.ask(at, layer, self._tensors.queries(frame, part.query_tokens), lse)
        self._asked.append((answer, time.perf_counter()))
        step.asked += 1
        if not self._answers.reads_lane:
            self._queries.drop()
        return True

    def _send_answer(self) -> bool:
        step = self.holdings.step
        if step is None or not self._asked or not self._answers.answered():
            return False
        answer, asked_s = self._asked.popleft()
        now = time.perf_counter()
        self._attended_s += now - max(asked_s, self._answered_s)  # two may be asked about at once
        self._answered_s = now
        if self._answers.reads_lane:
            self._queries.drop()  # before the answer goes out: the next query may follow at once
        self._partials.frame(answer)  # the next to be sent, whatever was asked since
        self._send_partial(step, answer)
        return True


def lane_buffers(tensors: FrameTensors, lane: Lane[LaneShape], tokens: int) -> LaneBuffers:
    """The frames of a lane with `RINGS` as captured steps see them, before anything is sent; `tokens` is the
    most of a step."""
    (queries,), partials = lane.receiver(Kind.QUERY).frames, lane.sender(Kind.PARTIAL).frames
    return LaneBuffers(
        tensors.queries(queries, tokens), tuple(tensors.queries(partial, tokens) for partial in partials)
    )
