"""What a forward pass leaves for choosing tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flume_weight.sampling import Outcome, Sampler, Shortlist, sample_rows, sample_shortlisted


@dataclass(slots=True)
class Scores:
    """Logits float32, on any device, which the next pass may overwrite. `rows` of them count, or all.

    A pass that found out on the device what samplers asked of these rows has `shortlists` of them.
    """

    buffer: Tensor  # [at least R, vocab]
    rows: Tensor | None = None  # int64 [R], on the host
    shortlists: Sequence[Shortlist | None] | None = None
    rows_read: int = 0  # for which a shortlist was not enough

    @property
    def logits(self) -> Tensor:
        """[R, vocab]."""
        return self.buffer if self.rows is None else self.buffer[self.rows.to(self.buffer.device)]

    def choose(self, samplers: Sequence[Sampler]) -> list[Outcome]:
        """Choose each row's token by its sampler, which records it; call it once. Rows fail one by one."""
        if self.shortlists is None:
            return sample_rows(samplers, self.logits)
        chosen, self.rows_read = sample_shortlisted(samplers, self.shortlists, self._logits_of)
        return chosen

    def _logits_of(self, picked: Sequence[int]) -> Tensor:
        which = torch.tensor(picked)
        rows = which if self.rows is None else self.rows[which]
        return self.buffer[rows.to(self.buffer.device)]
