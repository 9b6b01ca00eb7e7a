"""Choosing a token for every row of a step at once: from all logits, or from shortlists of them.

Rows are independent: one whose logits are invalid, or whose sampler raises, gets no token, and the tokens of
the others are what they would have been without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from flume_weight.sampling.invalid import require_finite
from flume_weight.sampling.sampler import Sampled, Sampler
from flume_weight.sampling.shortlist import Shortlist

if TYPE_CHECKING:
    from torch import Tensor  # the supervisor imports this package and must not load torch


@dataclass(frozen=True, slots=True)
class NotSampled:
    """No token for a row; its sequence must end. `error` is InvalidLogits where the model is at fault."""

    error: Exception


Outcome = Sampled | NotSampled
T = TypeVar("T")


def greedy(logits: Tensor) -> tuple[list[int], list[float]]:
    """Find the largest logit of each row and its token, the lowest id among equals.

    logits [R, V] on any device. Where a row has NaN the value is NaN and the token means nothing.
    """
    if logits.is_cpu:
        rows = logits.numpy()
        tokens = rows.argmax(axis=-1)  # the first NaN, if there is one
        values = rows[range(len(rows)), tokens]
        return tokens.tolist(), values.tolist()
    return _first_of_the_largest(logits)


def _first_of_the_largest(logits: Tensor) -> tuple[list[int], list[float]]:
    """Find them where they are; two numbers a row are copied. A device's own argmax takes any of equals."""
    import torch

    ids = torch.arange(logits.shape[1], device=logits.device)
    values = logits.amax(-1)
    tokens = torch.where(logits == values.unsqueeze(-1), ids, logits.shape[1] - 1).amin(-1)
    # In one copy: float64 holds a token id exactly.
    found = torch.stack([tokens.double(), values.double()]).tolist()
    return [int(token) for token in found[0]], found[1]


def sample_rows(samplers: Sequence[Sampler], logits: Tensor) -> list[Outcome]:
    """Row r of logits float32 [R, V], on any device, belongs to samplers[r]. Each records its token."""
    plain = [row for row, sampler in enumerate(samplers) if sampler.takes_the_largest]
    found = greedy(logits if len(plain) == len(logits) else logits[plain])
    largest = dict(zip(plain, zip(*found, strict=True), strict=True))
    if len(plain) < len(samplers):
        logits = logits.cpu()
    return [
        _attempt(_take, sampler, *largest[row]) if row in largest else _attempt(sampler.sample, logits[row])
        for row, sampler in enumerate(samplers)
    ]


def sample_shortlisted(
    samplers: Sequence[Sampler],
    shortlists: Sequence[Shortlist | None],
    logits_of: Callable[[Sequence[int]], Tensor],
) -> tuple[list[Outcome], int]:
    """The same tokens from shortlists, one per row; and of how many rows the logits had to be read.

    `logits_of` gives those of some rows, as `sample_rows` takes them; it is asked once at most.
    """
    chosen: list[Outcome | None] = [
        None if known is None else _attempt(sampler.sample_from, known)
        for sampler, known in zip(samplers, shortlists, strict=True)
    ]
    left = [row for row, outcome in enumerate(chosen) if outcome is None]
    if left:
        rest = sample_rows([samplers[row] for row in left], logits_of(left))
        for row, outcome in zip(left, rest, strict=True):
            chosen[row] = outcome
    return [outcome for outcome in chosen if outcome is not None], len(left)


def _take(sampler: Sampler, token_id: int, logit: float) -> Sampled:
    """Record the largest logit's token. Raises InvalidLogits."""
    require_finite(logit)
    sampler.accept(token_id)
    return Sampled(token_id)


def _attempt(choose: Callable[..., T], *args: Any) -> T | NotSampled:
    try:
        return choose(*args)
    except Exception as error:  # whatever it is, it is this row's alone
        return NotSampled(error)
