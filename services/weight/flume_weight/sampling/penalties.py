"""Penalties on tokens already seen: which tokens of a sequence count how often, and what it costs them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flume_weight.sampling.params import SamplingParams


class Penalties:
    """Counts over one sequence. Costs nothing where all three penalties are off."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], vocab_size: int
    ) -> None:
        self._repetition = params.repetition_penalty
        self._presence = params.presence_penalty
        self._frequency = params.frequency_penalty
        self.active = self._repetition != 1 or self._presence != 0 or self._frequency != 0
        if self.active:
            self._counts = np.bincount(np.asarray(output, dtype=np.int64), minlength=vocab_size)
            self._seen = self._counts > 0
            self._seen[np.asarray(prompt, dtype=np.int64)] = True

    def add(self, token_id: int) -> None:
        if self.active:
            self._counts[token_id] += 1
            self._seen[token_id] = True

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Changes logits [V] in place."""
        if not self.active:
            return
        if self._repetition != 1:
            self._repeat(logits)
        said = np.flatnonzero(self._counts)
        logits[said] -= (self._frequency * self._counts[said] + self._presence).astype(np.float32)

    def _repeat(self, logits: NDArray[np.float32]) -> None:
        seen = np.flatnonzero(self._seen)
        old = logits[seen].astype(np.float64)
        new = np.where(old > 0, old / self._repetition, old * self._repetition)
        logits[seen] = np.clip(new, *_FLOAT32)


_FLOAT32 = (float(np.finfo(np.float32).min), float(np.finfo(np.float32).max))
