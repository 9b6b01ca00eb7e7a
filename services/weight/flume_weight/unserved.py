"""Waiting sequences that no lane can serve: for how long they wait. No I/O; the caller brings the clock."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from flume_weight.sequence import Sequence
from flume_weight.serving_state import DRAINING_GRACE_S


@dataclass(slots=True)
class Unserved:
    """Remembers since when there has been no lane to a node that takes tails."""

    wait_s: float = 5.0
    """The setting `unavailable_wait_s`."""
    _since_s: float | None = None  # monotonic; None: there is one

    def note(self, now_s: float, *, lanes: int, open_lanes: int) -> None:
        """How many lanes there are, and how many of them lead to nodes that take tails.

        Nodes that all drain are mostly being replaced.
        """
        if open_lanes:
            self._since_s = None
        elif self._since_s is None:
            self._since_s = now_s + (DRAINING_GRACE_S if lanes else 0.0)
        elif not lanes:
            self._since_s = min(self._since_s, now_s)

    def overdue(self, waiting: Iterable[Sequence], now_s: float) -> list[Sequence]:
        """Those that have waited for a lane for too long."""
        return [sequence for sequence in waiting if now_s >= self._until_s(sequence)]

    def next_look_s(self, waiting: Iterable[Sequence], now_s: float) -> float:
        """Seconds until the first of them will have; infinity where none will."""
        return max(min(map(self._until_s, waiting), default=math.inf) - now_s, 0.0)

    def _until_s(self, sequence: Sequence) -> float:
        if self._since_s is None:
            return math.inf
        return max(self._since_s, sequence.arrived_s) + self.wait_s
