"""The lending end of a pull: answers READs, one chunk at a time, from ranges that are there right now.

It pins nothing: whoever owns a range may free it at any moment, and the next READ of it is refused by its
generation. So a puller that dies or dawdles costs no memory but its lane's.
"""

from __future__ import annotations

import time

from flume_common.lanes import Frame, Lane
from flume_common.pull_wire import Chunk, Pull, PulledHeader, PullOp, PullShape
from flume_common.wire import Header, Kind

from flume_attention.errors import ProtocolError
from flume_attention.frame_tensors import FrameTensors
from flume_attention.node import Node
from flume_attention.ranges import Range
from flume_attention.step_budget import StepBudget


class LendSession:
    """`advance` does one thing that can be done. Raises ProtocolError or LaneDown; the lane then ends."""

    def __init__(
        self,
        node: Node,
        puller: str,
        epoch: int,
        lane: Lane[PullShape],
        budget: StepBudget,
        *,
        node_epoch: int = 0,
    ) -> None:
        self.puller = puller
        self.epoch = epoch  # of the puller; ours is on what we send
        self.lane = lane
        self.ended: PullOp | None = None
        self._node = node
        self._node_epoch = node_epoch
        self._shape = lane.shape
        self._tensors = FrameTensors(lane.shape.layout)
        self._budget = budget
        self._pulls = lane.receiver(Kind.PULL)
        self._answers = lane.sender(Kind.PULLED)
        self._next: tuple[int, Pull] | None = None  # a READ that waits for its turn, and its number

    @property
    def waits(self) -> bool:
        """Whether a READ is put off until the next step."""
        return self._next is not None

    def advance(self, steps: int) -> bool:
        """False when there is nothing to do, or nothing that this step still allows."""
        self._next = self._next or self._poll()
        if self._next is None or not self._budget.allows(steps, time.monotonic()):
            return False
        frame = self._answers.frame()
        if frame is None:
            return False
        (number, pull), self._next = self._next, None
        self._answer(frame, number, pull)
        return True

    def _poll(self) -> tuple[int, Pull] | None:
        frame = self._pulls.poll()
        if frame is None:
            return None
        number, epoch = int(frame.header[Header.STEP]), int(frame.header[Header.EPOCH])
        try:
            pull = Pull.decode(frame.words)
        except ValueError as error:
            raise ProtocolError(f"PULL {number}: {error}") from error
        finally:
            self._pulls.give_back(frame)
        if epoch < self.epoch:
            self._node.epoch_rejected += 1
            return None
        if pull.op is PullOp.READ:
            return number, pull
        self.ended = pull.op
        return None

    def _answer(self, frame: Frame, number: int, pull: Pull) -> None:
        item = self._node.closed_range(pull.key, pull.start, pull.tokens)
        stale = item is not None and pull.generation not in (0, item.generation)
        size = 0
        if item is None or stale:
            self._node.pulls_refused += 1
            frame.header[PulledHeader.REFUSED] = 1
        else:
            size = self._copy(frame, item, pull.chunk)
            frame.header[PulledHeader.GENERATION] = item.generation
        frame.header[Header.STEP], frame.header[Header.EPOCH] = number, self._node_epoch
        self._answers.send(frame, size)

    def _copy(self, frame: Frame, item: Range, chunk: Chunk) -> int:
        layout, size = self._shape.layout, chunk.body_bytes(self._shape.layout)
        inside = 0 <= chunk.begin < chunk.end <= item.length and chunk.layers > 0
        if not inside or chunk.end_layer > layout.num_layers or size > self._shape.body_bytes(Kind.PULLED):
            raise ProtocolError(f"READ of {chunk} of a range of {item.length} tokens")
        assert self._node.pool is not None
        out = self._tensors.appended(frame, chunk.layers, chunk.tokens)
        self._node.pool.read(chunk.first_layer, item.runs(chunk.begin, chunk.end), out)
        self._budget.spend(chunk.tokens, chunk.layers)
        return size
