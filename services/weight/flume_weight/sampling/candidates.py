"""Which tokens may be drawn: min-p, then top-k, then top-p, on logits already divided by the temperature.

Ties are broken by token id, lowest first, so that exactly k tokens stay with top-k and top_k = 1 is greedy.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

FIRST_GUESS = 256  # tokens sorted at first for top-p; most answers need far fewer


def candidates(scaled: NDArray[np.float32], top_k: int, top_p: float, min_p: float) -> NDArray[np.int64]:
    """Token ids that stay, in no order. scaled [V]: logits over temperature, -inf for forbidden ones."""
    ids = np.arange(scaled.size) if min_p == 0 else _min_p(scaled, min_p)
    if 0 < top_k < ids.size:
        ids = ids[largest(scaled[ids], top_k)]
    if top_p < 1:
        ids = ids[_top_p(scaled[ids], top_p)]
    return ids


def largest(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest, the largest first, equal ones by the lower index."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    limit = np.partition(scores, -count)[-count]
    above = np.flatnonzero(scores > limit)
    ties = np.flatnonzero(scores == limit)[: count - above.size]
    return np.concatenate([above[np.argsort(-scores[above], kind="stable")], ties])


def _min_p(scaled: NDArray[np.float32], min_p: float) -> NDArray[np.int64]:
    """Tokens at least `min_p` times as likely as the most likely one."""
    return np.flatnonzero(scaled >= scaled.max() + math.log(min_p))


def _top_p(scores: NDArray[np.float32], top_p: float) -> NDArray[np.int64]:
    """Indices of the smallest set of most likely tokens whose mass reaches `top_p`."""
    mass = np.exp(scores - scores.max())
    wanted = top_p * mass.sum(dtype=np.float64)
    count = FIRST_GUESS
    while True:
        best = largest(scores, min(count, scores.size))
        sums = mass[best].cumsum(dtype=np.float64)
        if sums[-1] >= wanted or best.size == scores.size:
            # Rounding may keep even the whole sum short of what is wanted: then all stay.
            return best[: int(np.searchsorted(sums, wanted)) + 1]
        count *= 16
