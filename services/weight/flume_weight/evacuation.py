"""Closed ranges leave nodes that must be empty soon: the engine's side, between two steps.

The supervisor has them pulled; when they are whole elsewhere, their routes are swapped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq

from flume_weight import messages as m
from flume_weight.fleet import Fleet
from flume_weight.moves import RETRY_S, Batch
from flume_weight.peer import Peer
from flume_weight.sequence import Sequence


class Evacuation:
    """One batch at a time."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._moving: tuple[Batch, Peer] | None = None  # what is under way, and its target
        self._not_before_s = 0.0

    def next(self, running: Seq[Sequence]) -> m.MoveRanges | None:
        """What to have pulled now; None while a batch is under way, or when nothing has to go."""
        if self._moving is not None or time.monotonic() < self._not_before_s:
            return None
        batch = self._fleet.next_moves(running)
        if batch is None:
            return None
        self._moving = batch, self._fleet.peers[batch.target]
        ranges = [m.MovedRange(item.sequence, item.start, item.tokens) for item in batch.ranges]
        return m.MoveRanges(batch.source, batch.target, ranges)

    def moved(self, message: m.RangesMoved, running: Mapping[str, Sequence]) -> None:
        """Take what arrived; routes change by it."""
        assert self._moving is not None
        (batch, target), self._moving = self._moving, None
        here = {(item.sequence, item.start) for item in message.ranges}
        if not here:
            self._not_before_s = time.monotonic() + RETRY_S
        if self._fleet.peers.get(batch.target) is not target:
            return  # another process by now, or none
        for item in batch.ranges:
            sequence = running.get(item.sequence)
            if (item.sequence, item.start) not in here:
                continue
            self._fleet.swap(sequence, item, batch.target)
