"""How long to wait before trying again: exponential with full jitter. Pure but for the random number."""

from __future__ import annotations

import random


class Backoff:
    """`next_s()` draws from [0, min(cap, first · 2^n)], n counting up until `reset()`.

    Full jitter spreads those who lost the same server at the same moment.
    """

    def __init__(self, first_s: float = 0.1, cap_s: float = 2.0) -> None:
        self._first_s = first_s
        self._cap_s = cap_s
        self._attempts = 0

    def next_s(self) -> float:
        ceiling_s = min(self._cap_s, self._first_s * 2.0 ** min(self._attempts, 30))
        self._attempts += 1
        return random.uniform(0.0, ceiling_s)

    def reset(self) -> None:
        self._attempts = 0
