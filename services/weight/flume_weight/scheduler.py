"""Which tokens go into the next step. Pure.

Decoding sequences come first: one token each. Prefill fills what is left of the step's budget of tokens and
of time, in chunks cut where the tail's credit ends, smaller while others decode so that their inter-token
latency stays low. Half of that is for the oldest prompt, so that none starves; the rest goes to the prompts
with the fewest tokens left, so that a short one does not wait for long ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flume_weight.pace import Pace


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The size of a step."""

    max_sequences: int = 64
    prefill_tokens: int = 1024  # of one step in which nobody decodes
    mixed_prefill_tokens: int = 128  # beside decoding sequences

    def prefill(self, decoding: bool) -> int:
        return self.mixed_prefill_tokens if decoding else self.prefill_tokens

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
    context_tokens: int = 0  # before the pending ones


@dataclass(frozen=True, slots=True)
class Share:
    """A sequence's part of a step."""

    sequence: str
    tokens: int


@dataclass(frozen=True, slots=True)
class TimeBudget:
    """How long a step should last, and what is known of how long it will."""

    pace: Pace
    target_s: float
    most_tokens: int  # prompt tokens of the next step, whatever the pace promises
    least_blocks: int = 2  # of prompt tokens, whatever the target
    probe: bool = False  # take twice as much, if the target cannot be kept anyway


def schedule(
    candidates: Sequence[Candidate],
    unused_blocks: Mapping[str, int],
    block_tokens: int,
    limits: StepLimits,
    time: TimeBudget | None = None,
) -> list[Share]:
    """The step's shares, decodes first; candidates in order of arrival. Without `time` tokens alone count.

    A candidate whose tail has neither slack nor credit is left out: it waits for credit or a new tail.
    """
    credit = dict(unused_blocks)
    shares: dict[str, int] = {}

    def grant(candidate: Candidate, most_tokens: int) -> int:
        """Tokens that the candidate gets on top of what it has."""
        had = shares.get(candidate.sequence, 0)
        if not had and len(shares) == limits.max_sequences:
            return 0
        held = max(0, -(-(had - candidate.slack_tokens) // block_tokens))
        room = candidate.slack_tokens + (held + max(0, credit[candidate.node])) * block_tokens
        tokens = min(candidate.pending_tokens, had + most_tokens, room) - had
        if tokens <= 0:
            return 0
        shares[candidate.sequence] = had + tokens
        credit[candidate.node] -= max(0, -(-(had + tokens - candidate.slack_tokens) // block_tokens)) - held
        return tokens

    decoding = [candidate for candidate in candidates if candidate.pending_tokens == 1]
    for candidate in decoding:
        grant(candidate, 1)
    prompts = [candidate for candidate in candidates if candidate.pending_tokens > 1]
    budget = _PromptBudget(limits.prefill(bool(shares)), block_tokens, time, decoding if shares else ())
    reserve = 0.5 if len(prompts) > 1 else 1.0
    for oldest in prompts:
        if budget.spend(oldest, 0, grant(oldest, budget.tokens_for(oldest, 0, reserve))):
            break
    for candidate in sorted(prompts, key=lambda prompt: prompt.pending_tokens):
        had = shares.get(candidate.sequence, 0)
        budget.spend(candidate, had, grant(candidate, budget.tokens_for(candidate, had)))
    decodes = [Share(candidate.sequence, 1) for candidate in decoding if candidate.sequence in shares]
    return decodes + [
        Share(item.sequence, shares[item.sequence]) for item in prompts if item.sequence in shares
    ]


class _PromptBudget:
    """What is left of one step for prompt tokens."""

    def __init__(
        self, tokens: int, block_tokens: int, time: TimeBudget | None, decoding: Sequence[Candidate]
    ) -> None:
        self._block_tokens = block_tokens
        self._pace = time.pace if time is not None else Pace()
        self._tokens = tokens
        self._least_tokens = 0  # that are left whatever the time
        self._seconds = math.inf
        if time is not None:
            self._tokens = min(tokens, time.most_tokens)
            self._least_tokens = min(self._tokens, time.least_blocks * block_tokens)
            attended = sum(candidate.context_tokens for candidate in decoding)
            budget_s = self._pace.budget_s(time.target_s, bool(decoding))
            taken_s = self._pace.seconds(len(decoding), attended)
            self._seconds = budget_s - taken_s
            least_s = taken_s + self._pace.chunk_s(self._least_tokens, 0.0)
            if time.probe and max(budget_s, least_s) > time.target_s:
                self._seconds, self._least_tokens = (
                    2 * self._seconds,
                    min(self._tokens, 2 * self._least_tokens),
                )

    def tokens_for(self, candidate: Candidate, had: int, share: float = 1.0) -> int:
        """How many more this candidate could have if it gets this share of what is left."""
        context_tokens = candidate.context_tokens + had
        timely = self._pace.tokens_within(share * self._seconds, context_tokens) if self._timed else math.inf
        if timely < candidate.pending_tokens - had:  # a chunk that does not end the prompt ends a block
            timely = timely // self._block_tokens * self._block_tokens
        timely = max(timely, math.ceil(share * self._least_tokens))
        return int(min(timely, math.ceil(share * self._tokens)))

    @property
    def _timed(self) -> bool:
        return self._seconds < math.inf

    def spend(self, candidate: Candidate, had: int, tokens: int) -> int:
        """Take what was granted; returns it."""
        self._tokens -= tokens
        self._least_tokens = max(0, self._least_tokens - tokens)
        if self._timed:
            attended = tokens * (candidate.context_tokens + had + tokens / 2)
            self._seconds -= self._pace.chunk_s(tokens, attended)
        return tokens


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
