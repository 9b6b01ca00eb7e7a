"""How much of a pull may run between two decode steps, so that decode does not notice. Pure."""

from __future__ import annotations

IDLE_S = 0.02  # no step for so long: nobody waits for this node


class StepBudget:
    """`tokens_per_step` tokens, each in all of `num_layers` layers, for every step and every IDLE_S.

    A chunk larger than what is left is let through, and what it took too much is missing afterwards.
    """

    def __init__(self, tokens_per_step: int, num_layers: int) -> None:
        self._whole = tokens_per_step * num_layers
        self._left = self._whole
        self._step = -1
        self._refilled_s = float("-inf")

    def allows(self, step: int, now_s: float) -> bool:
        """Whether a chunk may go now; `step` is any number that changes with every step of the node."""
        if step != self._step or now_s - self._refilled_s >= IDLE_S:
            self._left = min(self._whole, self._left + self._whole)
            self._step, self._refilled_s = step, now_s
        return self._left > 0

    def spend(self, tokens: int, layers: int) -> None:
        self._left -= tokens * layers
