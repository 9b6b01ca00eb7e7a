"""Which tokens go into the next step. Pure.

Decoding sequences come first: one token each. Prefill fills what is left of the step's token budget
in order of arrival, in chunks cut where the tail's credit ends, smaller while others decode so that
their inter-token latency stays low.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The size of a step."""

    max_sequences: int = 64
    prefill_tokens: int = 1024  # of one step in which nobody decodes
    mixed_prefill_tokens: int = 128  # beside decoding sequences

    @property
    def max_tokens(self) -> int:
        """The most tokens a step can have."""
        return max(self.prefill_tokens, self.mixed_prefill_tokens + self.max_sequences)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A running sequence, as far as scheduling is concerned."""

    sequence: str
    node: str  # of its tail
    pending_tokens: int
    slack_tokens: int  # fit the tail's last block without new credit


@dataclass(frozen=True, slots=True)
class Share:
    """A sequence's part of a step."""

    sequence: str
    tokens: int


def schedule(
    candidates: Sequence[Candidate],
    unused_blocks: Mapping[str, int],
    block_tokens: int,
    limits: StepLimits,
) -> list[Share]:
    """The step's shares, decodes first; candidates in order of arrival.

    A candidate whose tail has neither slack nor credit is left out: it waits for credit or a new tail.
    """
    credit = dict(unused_blocks)
    shares: list[Share] = []

    def grant(candidate: Candidate, budget_tokens: int) -> int:
        room = candidate.slack_tokens + max(0, credit[candidate.node]) * block_tokens
        tokens = min(candidate.pending_tokens, budget_tokens, room)
        if tokens <= 0 or len(shares) == limits.max_sequences:
            return 0
        credit[candidate.node] -= max(0, -(-(tokens - candidate.slack_tokens) // block_tokens))
        shares.append(Share(candidate.sequence, tokens))
        return tokens

    for candidate in candidates:
        if candidate.pending_tokens == 1:
            grant(candidate, 1)
    budget = limits.mixed_prefill_tokens if shares else limits.prefill_tokens
    for candidate in candidates:
        if candidate.pending_tokens > 1 and budget > 0:
            budget -= grant(candidate, budget)
    return shares


def needed_blocks(candidates: Iterable[Candidate], block_tokens: int) -> dict[str, int]:
    """Blocks each node must still take to store what its tails have pending."""
    need: dict[str, int] = {}
    for candidate in candidates:
        tokens = max(0, candidate.pending_tokens - candidate.slack_tokens)
        need[candidate.node] = need.get(candidate.node, 0) + -(-tokens // block_tokens)
    return need


def admits(pending_tokens: int, available_blocks: int, running: int, block_tokens: int) -> bool:
    """Whether a waiting sequence may start: its tokens fit in what the running ones do not need.

    One block for each running sequence is kept free for its growth, so that an admission is not
    followed at once by a preemption.
    """
    wanted = -(-(pending_tokens + 1) // block_tokens)
    return wanted + running <= available_blocks
