"""Random numbers that are a function of (seed, position in the answer, token id), and of nothing else.

No generator is carried along, so a draw cannot depend on what else is in the batch, on how many candidates
were left, or on which weight node takes it. A token's noise being its own also makes draws robust: where two
runs differ in the last bits of their logits, they differ in a token only if two scores all but tie.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def stream_key(seed: int, position: int) -> int:
    """64 bits that name the draw of one token: SplitMix64 (Steele, Lea, Flood 2014) of seed and position."""
    return _mix64((_mix64(seed & MASK) + (position + 1) * GOLDEN) & MASK)


def gumbels(key: int, token_ids: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Standard Gumbel noise per token: argmax(logits + gumbels) is a draw from softmax(logits).

    -log(E) of an exponential E = -log(1 - u): the small E that win come from a small u, where float32
    keeps all 32 bits of it.
    """
    u = uniforms(key, token_ids)
    np.negative(u, out=u)
    np.log1p(u, out=u)
    np.negative(u, out=u)
    np.log(u, out=u)
    return np.negative(u, out=u)


def uniforms(key: int, token_ids: NDArray[np.uint32]) -> NDArray[np.float32]:
    """One number in (0, 1) per token id: a multiple of 2^-32, rounded to float32, never 0 or 1."""
    x = token_ids * np.uint32(0x9E3779B1)
    x += np.uint32(key & 0xFFFFFFFF)
    _mix32(x)
    # A second round under the other half of the key: two draws with related first halves part here.
    x ^= np.uint32(key >> 32)
    _mix32(x)
    u = x.astype(np.float32)
    u *= np.float32(2.0**-32)
    return np.clip(u, np.float32(2.0**-33), np.float32(1 - 2.0**-24), out=u)


@lru_cache(maxsize=2)
def all_tokens(vocab_size: int) -> NDArray[np.uint32]:
    """0 … vocab_size - 1, read only."""
    ids = np.arange(vocab_size, dtype=np.uint32)
    ids.flags.writeable = False
    return ids


def _mix64(value: int) -> int:
    """SplitMix64's finaliser: a bijection of 64 bits in which each input bit sways every output bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def _mix32(x: NDArray[np.uint32]) -> None:
    """MurmurHash3's 32-bit finaliser (Appleby), in place."""
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
