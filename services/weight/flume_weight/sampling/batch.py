"""Choosing a token for every row of a step at once: from all logits, or from shortlists of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from flume_weight.sampling.sampler import Sampled, Sampler
from flume_weight.sampling.shortlist import Shortlist

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


def sample_shortlisted(
    samplers: Sequence[Sampler],
    shortlists: Sequence[Shortlist | None],
    logits_of: Callable[[Sequence[int]], Tensor],
) -> tuple[list[Sampled], int]:
    """The same tokens from shortlists, one per row; and of how many rows the logits had to be read.

    `logits_of` gives those of some rows, as `sample_rows` takes them; it is asked once at most.
    """
    chosen = [
        None if known is None else sampler.sample_from(known)
        for sampler, known in zip(samplers, shortlists, strict=True)
    ]
    left = [row for row, sampled in enumerate(chosen) if sampled is None]
    if left:
        rest = sample_rows([samplers[row] for row in left], logits_of(left))
        for row, sampled in zip(left, rest, strict=True):
            chosen[row] = sampled
    return [sampled for sampled in chosen if sampled is not None], len(left)


def _accepted(sampler: Sampler, token_id: int) -> Sampled:
    sampler.accept(token_id)
    return Sampled(token_id)
