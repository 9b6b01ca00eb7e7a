"""How fast an attention node reads KV, from steps it has timed. Pure.

A step takes `fixed + bytes / bandwidth`: what does not grow with the bytes (waking up, launching kernels) is
most of a step of few tokens, so the ratio of the sums would be far too low. The slope of a least-squares
line through (bytes, seconds) of many steps is not; five sums and a count carry all of it.
"""

from __future__ import annotations

import math

import msgspec

LEAST_STEPS = 8
SIGNIFICANT = 4.0
"""A slope counts when it is so many standard errors above 0."""


class ReadSums(msgspec.Struct):
    """Over the steps of few queries, which are bound by reading. Sums, so two differ by a window."""

    steps: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    bytes_squared: float = 0.0
    seconds_squared: float = 0.0
    bytes_seconds: float = 0.0

    def add(self, read_bytes: int, seconds: float) -> None:
        """One step: what it read in all layers, and how long that took in all."""
        self.steps += 1
        self.bytes += read_bytes
        self.seconds += seconds
        self.bytes_squared += float(read_bytes) ** 2
        self.seconds_squared += seconds**2
        self.bytes_seconds += read_bytes * seconds

    def plus(self, other: ReadSums, share: float = 1.0) -> ReadSums:
        """With a share of the other; a negative one takes it away."""
        mine, others = msgspec.structs.astuple(self), msgspec.structs.astuple(other)
        return ReadSums(*(a + share * b for a, b in zip(mine, others, strict=True)))

    def bandwidth_bytes_per_s(self) -> float:
        """The reciprocal of the slope; 0 where the steps are too few or too alike to tell."""
        n = self.steps
        if n < LEAST_STEPS:
            return 0.0
        spread = self.bytes_squared - self.bytes**2 / n
        together = self.bytes_seconds - self.bytes * self.seconds / n
        if spread <= 0 or together <= 0:
            return 0.0
        slope = together / spread
        unexplained = max(self.seconds_squared - self.seconds**2 / n - slope * together, 0.0)
        error = math.sqrt(unexplained / (n - 2) / spread)
        return 1 / slope if slope > SIGNIFICANT * error else 0.0
