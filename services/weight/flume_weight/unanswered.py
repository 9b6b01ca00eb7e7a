"""What a node has not answered yet: the beginning of its lane, and PLANs. Pure; the clock is the caller's.

A node sends CREDIT when the lane begins and soon after each PLAN it takes, and says how many it has taken:
one that was sent before a PLAN came in does not answer it. Where none comes, nothing comes through.
"""

from __future__ import annotations

from collections import deque


class Unanswered:
    """Of one lane. All times are monotonic seconds."""

    def __init__(self, now_s: float) -> None:
        self._since_s = deque([now_s])  # the lane's beginning, then PLANs
        self._answered = 0

    @property
    def since_s(self) -> float | None:
        """Since when the oldest waits; None when all are answered."""
        return self._since_s[0] if self._since_s else None

    def asked(self, now_s: float) -> None:
        """A PLAN was sent."""
        self._since_s.append(now_s)

    def answered(self, plans_taken: int) -> None:
        """A CREDIT came from a node that had taken so many PLANs of this lane."""
        while self._since_s and self._answered <= plans_taken:
            self._since_s.popleft()
            self._answered += 1
