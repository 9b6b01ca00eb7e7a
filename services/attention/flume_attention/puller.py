"""The pulling end of a pull: reads ranges from another node into memory of this one, then says so, once.

A range becomes an arrival when its last byte is in its place; one that the lender refuses, or that there is
no room for here, is left out. Whatever way a pull ends, no block of an unfinished range stays held.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from flume_common.lanes import Frame, Lane
from flume_common.pull_wire import Chunk, Pull, PulledHeader, PullOp, PullShape, chunks
from flume_common.wire import Header, Kind

from flume_attention.errors import ProtocolError
from flume_attention.frame_tensors import FrameTensors
from flume_attention.node import Node
from flume_attention.ranges import Range
from flume_attention.step_budget import StepBudget

IN_FLIGHT = 2  # READs on their way: one is copied here while the other is copied there


@dataclass(frozen=True, slots=True)
class Wanted:
    """A closed range of a sequence."""

    key: int
    start: int
    tokens: int


@dataclass(slots=True)
class _Reading:
    """The range that is being read."""

    wanted: Wanted
    item: Range
    left: deque[Chunk]
    generation: int = 0  # not known before the first answer
    refused: bool = False


class PullSession:
    """`advance` does one thing that can be done. Raises ProtocolError or LaneDown; then `close` it."""

    def __init__(
        self,
        node: Node,
        weight_node: str,
        lane: Lane[PullShape],
        wanted: Iterable[Wanted],
        budget: StepBudget,
        *,
        node_epoch: int = 0,
        lender_epoch: int = 0,
    ) -> None:
        self.lane = lane
        self.pulled: list[Wanted] = []
        self.done = False  # the lender has heard COMPLETE, or nobody wants to know
        self._complete_sent = False
        self._node = node
        self._weight_node = weight_node
        self._shape = lane.shape
        self._tensors = FrameTensors(lane.shape.layout)
        self._to_read = deque(wanted)
        self._budget = budget
        self._epochs = node_epoch, lender_epoch
        self._reading: _Reading | None = None
        self._asked: deque[tuple[int, Chunk]] = deque()  # on their way, in order
        self._number = 0
        self._pulls = lane.sender(Kind.PULL)
        self._answers = lane.receiver(Kind.PULLED)

    @property
    def waits(self) -> bool:
        """Whether there is a READ to send, at the latest with the next step."""
        return not self.done and not self._asked

    def advance(self, steps: int) -> bool:
        """False when there is nothing to do, or nothing that this step still allows."""
        if self._complete_sent:
            self.done = self.done or self._pulls.idle
            return self.done
        return self._store() or self._ask(steps)

    def close(self) -> None:
        """End the pull, finished or not. Idempotent."""
        if self._reading is not None:
            self._reading.item.release()
            self._reading = None
        self.done = True
        self.lane.close()

    def abort(self) -> None:
        """There is no use in going on: tell the lender, if it can be told, and close."""
        if not self._complete_sent and self.lane.alive and (frame := self._pulls.frame()) is not None:
            self._send(frame, Pull(PullOp.ABORT))
        self.close()

    # Asking

    def _ask(self, steps: int) -> bool:
        reading = self._reading or self._begin()
        if reading is None:
            return self._complete()
        window = IN_FLIGHT if reading.generation else 1
        if reading.refused or len(self._asked) >= window:
            return False
        if not self._budget.allows(steps, time.monotonic()):
            return False
        frame = self._pulls.frame() if reading.left else None
        if frame is None:
            return False
        wanted, chunk = reading.wanted, reading.left.popleft()
        pull = Pull(PullOp.READ, wanted.key, wanted.start, wanted.tokens, reading.generation, chunk)
        self._asked.append((self._send(frame, pull), chunk))
        self._budget.spend(chunk.tokens, chunk.layers)
        return True

    def _begin(self) -> _Reading | None:
        """The next range that there is room for."""
        while self._to_read:
            wanted = self._to_read.popleft()
            item = self._node.make_room(wanted.start, wanted.tokens)
            if item is not None:
                left = chunks(wanted.tokens, self._shape.layout, self._shape.chunk_bytes)
                self._reading = _Reading(wanted, item, deque(left))
                return self._reading
        return None

    def _complete(self) -> bool:
        frame = self._pulls.frame()
        if frame is not None:
            self._send(frame, Pull(PullOp.COMPLETE))
            self._complete_sent = True
        return frame is not None

    def _send(self, frame: Frame, pull: Pull) -> int:
        self._number += 1
        frame.header[Header.STEP], frame.header[Header.EPOCH] = self._number, self._epochs[0]
        self._pulls.send(frame, pull.encode(frame.words))
        return self._number

    # Storing

    def _store(self) -> bool:
        frame = self._answers.poll()
        if frame is None:
            return False
        try:
            self._take(frame)
        finally:
            self._answers.give_back(frame)
        return True

    def _take(self, frame: Frame) -> None:
        header = frame.header
        if header[Header.EPOCH] < self._epochs[1]:
            self._node.epoch_rejected += 1
            return
        if not self._asked or header[Header.STEP] != self._asked[0][0] or self._reading is None:
            raise ProtocolError(f"PULLED {header[Header.STEP]} answers nothing that was asked")
        reading, (_, chunk) = self._reading, self._asked.popleft()
        generation = int(header[PulledHeader.GENERATION])
        if header[PulledHeader.REFUSED] or reading.generation not in (0, generation):
            reading.refused = True
        elif not reading.refused:
            reading.generation = generation
            self._write(frame, reading.item, chunk)
        if not self._asked:
            self._end_range(reading)

    def _write(self, frame: Frame, item: Range, chunk: Chunk) -> None:
        size = chunk.body_bytes(self._shape.layout)
        if frame.header[Header.BODY_BYTES] != size:
            raise ProtocolError(f"PULLED of {frame.header[Header.BODY_BYTES]} bytes, expected {size}")
        assert self._node.pool is not None
        kv = self._tensors.appended(frame, chunk.layers, chunk.tokens)
        self._node.pool.write(chunk.first_layer, kv, item.runs(chunk.begin, chunk.end))

    def _end_range(self, reading: _Reading) -> None:
        """Nothing is on its way: the range is refused, waits for its next READ, or is whole."""
        if reading.refused:
            reading.item.release()
            self._reading = None
            return
        if reading.left:
            return
        self._reading = None
        reading.item.commit(reading.wanted.tokens)
        reading.item.closed = True
        self._node.arrivals.add(self._weight_node, reading.wanted.key, reading.item, time.monotonic())
        self._node.pulled_tokens += reading.wanted.tokens
        self.pulled.append(reading.wanted)
