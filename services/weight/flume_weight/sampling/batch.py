"""Choosing a token for every row of a step at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flume_weight.sampling.sampler import Sampled, Sampler

if TYPE_CHECKING:
    from torch import Tensor  # the supervisor imports this package and must not load torch


def greedy(logits: Tensor) -> list[int]:
    """logits [R, V] on any device -> the largest of each row, the lowest token id among equals."""
    if logits.is_cpu:
        return [int(token) for token in logits.numpy().argmax(axis=-1)]
    return _first_of_the_largest(logits)


def _first_of_the_largest(logits: Tensor) -> list[int]:
    """Where they are: only the tokens are copied. A device's own argmax may name any of equals."""
    import torch

    ids = torch.arange(logits.shape[1], device=logits.device)
    largest = logits == logits.amax(-1, keepdim=True)
    tokens: list[int] = torch.where(largest, ids, logits.shape[1] - 1).amin(-1).tolist()
    return tokens


def sample_rows(samplers: Sequence[Sampler], logits: Tensor) -> list[Sampled]:
    """Row r of logits float32 [R, V], on any device, belongs to samplers[r]. Each records its token."""
    plain = [row for row, sampler in enumerate(samplers) if sampler.takes_the_largest]
    largest = dict(zip(plain, greedy(logits if len(plain) == len(logits) else logits[plain]), strict=True))
    if len(plain) < len(samplers):
        logits = logits.cpu()
    return [
        _accepted(sampler, largest[row]) if row in largest else sampler.sample(logits[row])
        for row, sampler in enumerate(samplers)
    ]


def _accepted(sampler: Sampler, token_id: int) -> Sampled:
    sampler.accept(token_id)
    return Sampled(token_id)
