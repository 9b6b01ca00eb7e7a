"""How long steps with prompt tokens take here, measured, and how many tokens keep one near a target. Pure.

A step costs `fixed_s` (the weights are read once), `token_s` for each token and `context_s` for each pair of
a token and one that it attends to. The three are fitted to the last steps by least squares over relative
errors; none is negative. A factor follows a machine that becomes slower or faster within a few steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np

START_TOKENS = 64
"""Of the first chunk, before anything is known: a short step on any machine."""
_MEMORY = 0.95  # weight of a step against the one after it
_GAIN_STEP = 0.5  # how much of a surprise counts at once
_NO_SURPRISE = 1.3  # up to here the fit itself learns from it
_MOST_SURPRISE = 4.0  # of one step: it may have waited for something else
_SHRINK = np.array([0.01, 0.001, 0.01])  # towards costs per token, where steps alike leave it open
_SUBSETS = [list(chosen) for size in (3, 2, 1) for chosen in combinations(range(3), size)]
_GROWTH = 2.0
_PROBE_EVERY = 6


@dataclass(frozen=True, slots=True)
class Pace:
    """What steps cost, in seconds. All zero: nothing is known."""

    fixed_s: float = 0.0
    token_s: float = 0.0
    context_s: float = 0.0

    def seconds(self, tokens: float, attended: float) -> float:
        """Of a step of so many tokens, with so many pairs of a token and one that it attends to."""
        return self.fixed_s + self.chunk_s(tokens, attended)

    def chunk_s(self, tokens: float, attended: float) -> float:
        """What such tokens add to a step."""
        return self.token_s * tokens + self.context_s * attended

    def tokens_within(self, seconds: float, context_tokens: int) -> float:
        """The chunk that adds so much, if it begins at this position; infinite where tokens cost nothing."""
        if seconds <= 0:
            return 0.0
        slope, curve = self.token_s + self.context_s * context_tokens, self.context_s
        if slope <= 0 and curve <= 0:
            return math.inf
        # Token i of the chunk attends to context_tokens + i others.
        return 2 * seconds / (slope + math.sqrt(slope * slope + 2 * curve * seconds))

    def budget_s(self, target_s: float, decoding: bool) -> float:
        """How long a step should last: the target, unless most of it would go into what is fixed.

        Then a step beside decoding sequences may last twice the fixed part, which they pay anyway. Alone it
        may last four times that, within four times the target, so that long prompts are not slowed down.
        """
        most_s = max(target_s, 2 * self.fixed_s)
        return most_s if decoding else max(most_s, min(4 * self.fixed_s, 4 * target_s))


class PaceEstimate:
    """Learns from every step with prompt tokens."""

    def __init__(self) -> None:
        self._moments = np.zeros((3, 3))
        self._sums = np.zeros(3)
        self._fit = np.zeros(3)
        self._gain = 1.0
        self.last_tokens = 0  # of the last step that was noted
        self._noted = 0

    def note(self, tokens: int, attended: float, seconds: float) -> None:
        """A step of so many tokens, attending to so many others in all, took so long."""
        if tokens <= 0 or not 0 < seconds < math.inf:
            return
        self.last_tokens = tokens
        self._noted += 1
        step = np.array([1.0, tokens, attended])
        if (predicted_s := float(self._fit @ step)) > 0:
            self._gain *= _beyond(seconds / (self._gain * predicted_s)) ** _GAIN_STEP
        row = step * self._gain / seconds  # relative errors count, and not how fast the machine is just now
        self._moments = _MEMORY * self._moments + np.outer(row, row)
        self._sums = _MEMORY * self._sums + row
        self._fit = _fitted(self._moments, self._sums)

    @property
    def pace(self) -> Pace:
        fixed_s, token_s, context_s = (self._gain * self._fit).tolist()
        return Pace(fixed_s, token_s, context_s)

    @property
    def probes(self) -> bool:
        """Whether the next step may be larger than asked for, where a target cannot be kept anyway.

        Steps that are all alike leave open what part of them is fixed, and so whether larger ones would pay.
        """
        return self._noted % _PROBE_EVERY == _PROBE_EVERY - 1

    @property
    def most_tokens(self) -> int:
        """Of the next step: what has been measured is trusted up to twice its size."""
        return max(START_TOKENS, int(_GROWTH * self.last_tokens))


def _beyond(ratio: float) -> float:
    """What of a ratio of times is a surprise, within bounds."""
    inside = min(max(ratio, 1 / _NO_SURPRISE), _NO_SURPRISE)
    return min(max(ratio / inside, 1 / _MOST_SURPRISE), _MOST_SURPRISE)


def _fitted(moments: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """The costs, none negative, that explain the noted steps best."""
    penalised = moments + np.diag(_SHRINK * moments.diagonal())
    best, best_error = np.zeros(3), 0.0
    for chosen in _SUBSETS:
        some = penalised[np.ix_(chosen, chosen)]
        if not some.diagonal().all():
            continue  # none of the steps attended to anything
        scale = 1 / np.sqrt(some.diagonal())  # the three differ by many orders of magnitude
        found = scale * np.linalg.solve(some * np.outer(scale, scale), scale * sums[chosen])
        error = float(found @ some @ found - 2 * found @ sums[chosen])
        if (found >= 0).all() and error < best_error:
            best, best_error = np.zeros(3), error
            best[chosen] = found
    return best
