"""Choosing a token for every row of a step at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flume_weight.sampling.sampler import Sampled, Sampler

if TYPE_CHECKING:
    from torch import Tensor  # the supervisor imports this package and must not load torch


def greedy(logits: Tensor) -> list[int]:
    """logits [R, V] -> the largest of each row, the lowest token id among equals."""
    return [int(token) for token in logits.cpu().numpy().argmax(axis=-1)]


def sample_rows(samplers: Sequence[Sampler], logits: Tensor) -> list[Sampled]:
    """Row r of logits float32 [R, V] belongs to samplers[r]. Each records its token."""
    rows = logits.cpu().numpy()
    plain = [row for row, sampler in enumerate(samplers) if sampler.takes_the_largest]
    largest = dict(zip(plain, greedy(logits if len(plain) == len(rows) else logits[plain]), strict=True))
    return [
        _accepted(sampler, largest[row]) if row in largest else sampler.sample(rows[row])
        for row, sampler in enumerate(samplers)
    ]


def _accepted(sampler: Sampler, token_id: int) -> Sampled:
    sampler.accept(token_id)
    return Sampled(token_id)
