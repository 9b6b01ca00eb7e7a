"""Random numbers that are a function of (seed, position in the answer, token id), and of nothing else.

No generator is carried along, so a draw cannot depend on what else is in the batch, on how many candidates
were left, or on which weight node takes the draw. The hash is SplitMix64 (Steele, Lea, Flood 2014).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def stream_key(seed: int, position: int) -> int:
    """64 bits that name the draw of one token."""
    return mix(mix(seed & MASK) + (position + 1) * GOLDEN & MASK)


def mix(value: int) -> int:
    """SplitMix64's finaliser: a bijection of 64 bits in which each input bit sways every output bit."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def uniforms(key: int, token_ids: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in (0, 1) for each token id."""
    x = (token_ids + np.uint64(1)) * np.uint64(GOLDEN)
    x += np.uint64(key)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    # 52 bits and a half step, so that neither 0 nor 1 can come out after rounding.
    return ((x >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def gumbels(key: int, token_ids: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Standard Gumbel noise: argmax(logits + gumbels) is a draw from softmax(logits)."""
    u = uniforms(key, token_ids)
    return -np.log(-np.log(u))
