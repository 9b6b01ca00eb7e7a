"""Choosing a token from what a device found out about its logits, without seeing them all.

A `Sampler` says what it has to know (`Ask`), the step computes it (`Shortlist`), and `drawn` names the token
that the sampler would have drawn from all the logits; or none, where what is known does not prove it, and
then the logits must be read. Pure. Two proofs:

* The tokens that may be drawn are the first so many of one order (min-p, top-k and top-p all keep the largest
  logits), and how many lies between two bounds. Where the upper one is within the candidates, their scores
  are computed here as the sampler does: the best one, if it is within the lower bound too, is the token.
* The best score of all tokens was found on the device. If it was ahead of the next by more than rounding can
  explain, and its token is within the lower bound, no other can be the best of those that may be drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flume_weight.sampling.noise import gumbels
from flume_weight.sampling.params import SamplingParams

CANDIDATES = 64  # a power of two; more than the top-k that people ask for
MIN_TEMPERATURE = 1e-30  # below it float32 has no quotient; the draw is greedy long before
# Scores that can be the best are between -3 and 23, of terms up to 26: each is off by less than 3e-5 on a
# device (float32 has steps of 2e-6 there; its logarithm of what is next to 1 is the largest part).
DEVICE_ROUNDING = 2e-4
HOST_ROUNDING = 1e-5  # the same where both are computed here, over other lengths of arrays
MASS_ERROR = 1e-4  # relative, of a sum over all tokens in float32
SUM_ERROR = 1e-6  # relative, of sums over candidates


@dataclass(frozen=True, slots=True)
class Ask:
    """What one draw depends on but for the logits."""

    temperature: float  # 0: nothing is drawn; otherwise at least MIN_TEMPERATURE
    key: int  # `noise.stream_key` of the draw
    candidates: bool  # whether more than the largest logit must be known


@dataclass(frozen=True, slots=True)
class Shortlist:
    """What is known of one row of logits.

    The candidates are the n largest logits, the largest first, equal ones by the lower token. For an Ask
    without candidates n is 1; without a temperature there are no scores.
    """

    token_ids: NDArray[np.int32]  # [n]
    logits: NDArray[np.float32]  # [n]
    vocab_size: int
    mass: float  # Σ exp(logit - largest) over all tokens
    scaled_mass: float  # Σ exp((logit - largest) / temperature)
    best: int  # the token of the best score, (logit - largest) / temperature + its noise
    best_logit: float
    margin: float  # of the best score over the next

    @property
    def valid(self) -> bool:
        """Whether the logits are ones to choose from.

        One NaN or +inf makes the mass NaN, on every device, and it is 0 where all of them are -inf.
        """
        return self.mass > 0 and math.isfinite(self.mass)


def drawn(params: SamplingParams, key: int, known: Shortlist) -> int | None:
    """The token that a draw from all the logits gives, if what is known proves it. There is a temperature."""
    scaled = known.logits - known.logits[0]
    with np.errstate(over="ignore"):  # to -inf, as in the sampler
        scaled /= np.float32(max(params.temperature, MIN_TEMPERATURE))
    least, most = bounds(params, scaled, known.vocab_size, known.scaled_mass)
    if known.margin > DEVICE_ROUNDING and (
        least == known.vocab_size or (known.token_ids[:least] == known.best).any()
    ):
        return known.best
    if most is None:
        return None
    ids = known.token_ids[:most]
    scores = scaled[:most] + gumbels(key, ids.astype(np.uint32))
    at = int(scores.argmax())
    alone = np.count_nonzero(scores >= scores[at] - HOST_ROUNDING) == 1
    return int(ids[at]) if at < least and alone else None


def bounds(
    params: SamplingParams, scaled: NDArray[np.float32], vocab_size: int, mass: float
) -> tuple[int, int | None]:
    """How many of the candidates, from the first, may surely be drawn, and how many at most.

    `vocab_size` at least: all tokens. None at most: more than the candidates, or it is not known.
    scaled [n]: (logit - largest) / temperature of the candidates; `mass` is Σ exp of it over all tokens.
    """
    if not truncates(params):
        return vocab_size, vocab_size if scaled.size == vocab_size else None
    left = _left(params, scaled, vocab_size)
    if params.top_p == 1:
        return _apart(scaled, vocab_size, scaled.size if left is None else left, left)
    sums = np.exp(scaled[:left]).cumsum(dtype=np.float64)
    low, high = _mass_bounds(params, sums, left, mass)
    least = int(np.searchsorted(sums, params.top_p * low)) + 1
    most = int(np.searchsorted(sums, params.top_p * high)) + 1
    return _apart(scaled, vocab_size, min(least, sums.size), most if most <= sums.size else left)


def _apart(
    scaled: NDArray[np.float32], vocab_size: int, least: int, most: int | None
) -> tuple[int, int | None]:
    """The same with no bound between equals.

    The sampler takes equals by their token, but sees logits after a division that makes equals of some that
    were not: among these, and the first ones that are no candidates, any may be before another.
    """
    if _tied(scaled, vocab_size, least):
        least = int(np.count_nonzero(scaled > scaled[least - 1]))
    if most is not None and _tied(scaled, vocab_size, most):
        most = int(np.count_nonzero(scaled >= scaled[most - 1]))
        if most == scaled.size < vocab_size:
            return least, None
    return least, most


def _tied(scaled: NDArray[np.float32], vocab_size: int, at: int) -> bool:
    """Whether what comes at this place may equal what comes before it."""
    if at == scaled.size:
        return at < vocab_size
    return bool(scaled[at] == scaled[at - 1])


def truncates(params: SamplingParams) -> bool:
    """Whether some tokens may not be drawn at all."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _left(params: SamplingParams, scaled: NDArray[np.float32], vocab_size: int) -> int | None:
    """How many tokens min-p and top-k leave; None where that is more than the candidates, or may be."""
    left = scaled.size if scaled.size == vocab_size else None
    if params.min_p > 0:
        above = int(np.count_nonzero(scaled >= scaled[0] + math.log(params.min_p)))
        if above < scaled.size:
            left = above
    if 0 < params.top_k <= scaled.size:
        left = params.top_k if left is None else min(left, params.top_k)
    return left


def _mass_bounds(
    params: SamplingParams, sums: NDArray[np.float64], left: int | None, mass: float
) -> tuple[float, float]:
    """Between what the mass lies of the tokens that min-p and top-k leave."""
    if left is not None:
        return sums[-1] * (1 - SUM_ERROR), sums[-1] * (1 + SUM_ERROR)
    whole = params.min_p == 0 and params.top_k <= 0
    low = mass * (1 - MASS_ERROR) if whole else sums[-1] * (1 - SUM_ERROR)
    return low, mass * (1 + MASS_ERROR)
